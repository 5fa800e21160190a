"""Zeros that are held: exact at every forward, through any optimizer, until released."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_roulette import Mask, prunable_parameters
from lightning_roulette.core.holding import ZeroHold

OPTIMIZERS = {
    "sgd with momentum and decay": lambda weights: SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd with nesterov": lambda weights: SGD(weights, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda weights: Adam(weights, lr=0.05),
    "adam with l2": lambda weights: Adam(weights, lr=0.05, weight_decay=0.1, amsgrad=True),
    "adamw": lambda weights: AdamW(weights, lr=0.05, weight_decay=0.5),
    "rmsprop": lambda weights: RMSprop(weights, lr=0.01, momentum=0.9),
    "adagrad": lambda weights: Adagrad(weights, lr=0.05, initial_accumulator_value=0.1),
    "lbfgs": lambda weights: LBFGS(weights, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
}


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, Y = noise(32, 6, seed=1), noise(32, 2, seed=2)


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed))
    return net


def half_of(net: nn.Module) -> Mask:
    """A checkerboard, so that every unit keeps inputs and outputs and its weights learn on."""
    weights = prunable_parameters(net)
    boards = {name: torch.arange(w.shape[0])[:, None] + torch.arange(w.shape[1]) for name, w in weights.items()}
    return Mask({name: board % 2 == 0 for name, board in boards.items()})


def pruned_entries(net: nn.Module, mask: Mask) -> torch.Tensor:
    parameters = dict(net.named_parameters())
    return torch.cat([parameters[name].detach()[~kept] for name, kept in mask.items()])


def pruned_memories(optimizer: torch.optim.Optimizer, net: nn.Module, mask: Mask) -> list[torch.Tensor]:
    """What the optimizer remembers of pruned entries, one tensor for each of its memories."""
    parameters = dict(net.named_parameters())
    return [
        memory[~kept]
        for name, kept in mask.items()
        for memory in optimizer.state[parameters[name]].values()
        if isinstance(memory, torch.Tensor) and memory.shape == kept.shape
    ]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seen=None) -> None:
    """`steps` steps; `seen` is called at every forward, those that a line search makes included."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        if seen is not None:
            seen()
        loss = mse_loss(net(X), Y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("made", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "fresh"])
def test_pruned_weights_are_zero_at_every_forward(made, warm):
    net = network()
    optimizer, mask = made(net.parameters()), half_of(net)
    train(net, optimizer, 5 if warm else 0)  # momentum that would move them
    ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    forwards = []

    def seen() -> None:
        forwards.append(int(pruned_entries(net, mask).count_nonzero()))

    before = net[0].weight.detach().clone()
    train(net, optimizer, 20, seen)
    seen()
    assert len(forwards) >= 21
    assert set(forwards) == {0}
    kept = mask["0.weight"]
    assert (net[0].weight.detach()[kept] != before[kept]).all()  # the others train on


@pytest.mark.parametrize("made", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_without_a_hold_the_zeros_are_lost(made):
    # what the tests above would see if nothing were held
    net = network()
    optimizer, mask = made(net.parameters()), half_of(net)
    hold = ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    train(net, optimizer, 2)
    assert not pruned_entries(net, mask).any()
    hold.release()
    assert not pruned_entries(net, mask).any()
    train(net, optimizer, 2)
    assert pruned_entries(net, mask).all()


@pytest.mark.parametrize("made", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_release_leaves_no_hook_behind(made):
    plain, held = network(), network()
    optimizers = [made(plain.parameters()), made(held.parameters())]
    hold = ZeroHold(dict(held.named_parameters()), Mask.full(prunable_parameters(held)), [optimizers[1]])
    hold.release()
    hold.release()
    assert not optimizers[1]._optimizer_step_post_hooks
    assert not optimizers[1]._optimizer_step_pre_hooks
    for net, optimizer in zip((plain, held), optimizers, strict=True):
        train(net, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), held.parameters(), strict=True))


@pytest.mark.parametrize("made", [made for name, made in OPTIMIZERS.items() if name != "lbfgs"])
def test_an_optimizer_remembers_nothing_of_pruned_weights(made):
    net = network()
    optimizer, mask = made(net.parameters()), half_of(net)
    train(net, optimizer, 5)
    assert any(memory.any() for memory in pruned_memories(optimizer, net, mask))
    ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    for _ in range(3):
        memories = pruned_memories(optimizer, net, mask)
        assert len(memories) >= 2
        # decay that is added to the gradient adds nothing to a weight of zero
        assert not any(memory.any() for memory in memories)
        train(net, optimizer, 2)


def test_what_is_remembered_of_kept_weights_and_steps_taken_stays():
    net = network()
    optimizer, mask = Adam(net.parameters()), half_of(net)
    train(net, optimizer, 5)
    state = optimizer.state[net[0].weight]
    kept = mask["0.weight"]
    before = {name: memory.clone() for name, memory in state.items()}
    ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    assert float(state["step"]) == 5
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name][kept], before[name][kept])
    assert optimizer.state[net[0].bias]["exp_avg"].any()


def test_lbfgs_forgets_its_history():
    net = network()
    optimizer = LBFGS(net.parameters(), lr=0.5, max_iter=4)
    train(net, optimizer, 3)
    assert optimizer.state[net[0].weight]["old_dirs"]
    ZeroHold(dict(net.named_parameters()), half_of(net), [optimizer])
    assert not optimizer.state


def masked_network(net: nn.Module, mask: Mask):
    """The loss of the network that multiplies its weights by the mask: its gradient is the pruned network's."""
    parameters = dict(net.named_parameters())
    product = {name: one * mask[name] if name in mask else one for name, one in parameters.items()}
    return mse_loss(torch.func.functional_call(net, product, (X,)), Y)


def test_clipping_sees_the_gradient_of_the_pruned_network():
    net, reference = network(), network()
    mask, optimizer = half_of(net), SGD(net.parameters(), lr=0.1)
    ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    mse_loss(net(X), Y).backward()
    masked_network(reference, mask).backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1), rtol=1e-6)
    unpruned = network()
    mse_loss(unpruned(X), Y).backward()
    assert norm < 0.95 * nn.utils.get_total_norm([one.grad for one in unpruned.parameters()])


def test_training_is_that_of_the_pruned_network():
    net, reference = network(), network()
    mask = half_of(net)
    optimizers = [SGD(one.parameters(), lr=0.05, momentum=0.9) for one in (net, reference)]
    ZeroHold(dict(net.named_parameters()), mask, optimizers[:1])
    train(net, optimizers[0], 20)
    for _ in range(20):
        optimizers[1].zero_grad()
        masked_network(reference, mask).backward()
        optimizers[1].step()
    for name, one in reference.named_parameters():
        expected = one * mask[name] if name in mask else one
        assert torch.allclose(dict(net.named_parameters())[name], expected, atol=1e-6)


def test_accumulated_gradients_stay_zero_at_pruned_weights():
    net = network()
    mask, optimizer = half_of(net), AdamW(net.parameters(), lr=0.05, weight_decay=0.5)
    ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    for _ in range(5):
        for part in range(4):
            mse_loss(net(X[part::4]), Y[part::4]).backward()
            assert not net[0].weight.grad[~mask["0.weight"]].any()
            assert net[0].weight.grad[mask["0.weight"]].all()
        optimizer.step()
        optimizer.zero_grad()
        assert not pruned_entries(net, mask).any()


def test_gradients_written_by_others_do_not_reach_the_optimizer():
    # as a distributed reduction does, after the gradients were accumulated
    net = network()
    mask, optimizer = half_of(net), SGD(net.parameters(), lr=0.1, momentum=0.9)
    ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    momentum = optimizer.state[net[0].weight]["momentum_buffer"]
    assert torch.equal(momentum, mask["0.weight"].float())
    assert not pruned_entries(net, mask).any()


def test_gradients_accumulated_before_the_hold_are_cleared():
    net = network()
    mask, optimizer = half_of(net), SGD(net.parameters(), lr=0.1)
    mse_loss(net(X), Y).backward()
    ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    assert not net[0].weight.grad[~mask["0.weight"]].any()


def test_nan_gradients_at_pruned_weights_do_no_harm():
    net = network()
    mask, optimizer = half_of(net), Adam(net.parameters(), lr=0.1)
    ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    net[0].weight.grad = torch.ones_like(net[0].weight).masked_fill(~mask["0.weight"], torch.nan)
    optimizer.step()
    assert not pruned_entries(net, mask).any()
    assert net[0].weight.isfinite().all()
    assert not optimizer.state[net[0].weight]["exp_avg"][~mask["0.weight"]].any()


def test_parameters_and_their_names_stay():
    net = network()
    before = {name: (id(one), one.data_ptr()) for name, one in net.named_parameters()}
    ZeroHold(dict(net.named_parameters()), half_of(net), [SGD(net.parameters(), lr=0.1)])
    assert {name: (id(one), one.data_ptr()) for name, one in net.named_parameters()} == before


def test_every_one_of_several_optimizers_is_held():
    net = network()
    mask = half_of(net)
    optimizers = [AdamW(layer.parameters(), lr=0.05, weight_decay=0.5) for layer in (net[0], net[2])]
    for optimizer in optimizers:
        train(net, optimizer, 3)
    ZeroHold(dict(net.named_parameters()), mask, optimizers)
    for _ in range(5):
        for optimizer in optimizers:
            train(net, optimizer, 1)
        assert not pruned_entries(net, mask).any()


def test_fill_clears_what_was_written_from_outside():
    # as an optimizer that is not torch's, or weight averaging, would
    net = network()
    mask = half_of(net)
    hold = ZeroHold(dict(net.named_parameters()), mask, [])
    with torch.no_grad():
        net[0].weight.fill_(3.0)
    hold.fill()
    assert torch.equal(net[0].weight.detach(), 3.0 * mask["0.weight"])


def test_a_frozen_weight_is_held_too():
    net = network()
    net[0].weight.requires_grad_(False)
    mask = half_of(network())
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    with torch.no_grad():
        net[0].weight.fill_(3.0)
    train(net, optimizer, 1)
    assert not pruned_entries(net, mask).any()


def test_an_optimizer_that_moves_weights_without_a_gradient_is_held():
    class Langevin(SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for weight in self.param_groups[0]["params"]:
                    weight.add_(0.01)

    net = network()
    mask, optimizer = half_of(net), Langevin(net.parameters(), lr=0.1)
    ZeroHold(dict(net.named_parameters()), mask, [optimizer])
    train(net, optimizer, 2)
    assert not pruned_entries(net, mask).any()
