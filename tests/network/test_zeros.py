"""Pruned weights stay exactly zero at every forward, with any optimizer, until they are released."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import ASGD, LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, RMSprop, SparseAdam

from lightning_roulette import Mask, prunable_parameters
from lightning_roulette.network.zeros import ZeroFill, ZeroHold

OPTIMIZERS = {
    "sgd, fused": lambda weights: SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "adam, fused": lambda weights: Adam(weights, lr=0.05, fused=True),
    "adamw, foreach": lambda weights: AdamW(weights, lr=0.05, weight_decay=0.5, foreach=True),
    "nadam": lambda weights: NAdam(weights, lr=0.05),
    "asgd": lambda weights: ASGD(weights, lr=0.05, weight_decay=0.1),
    "sgd with momentum and decay": lambda weights: SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd with nesterov": lambda weights: SGD(weights, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda weights: Adam(weights, lr=0.05),
    "adam with l2": lambda weights: Adam(weights, lr=0.05, weight_decay=0.1, amsgrad=True),
    "adamw": lambda weights: AdamW(weights, lr=0.05, weight_decay=0.5),
    "rmsprop": lambda weights: RMSprop(weights, lr=0.01, momentum=0.9),
    "adagrad": lambda weights: Adagrad(weights, lr=0.05, initial_accumulator_value=0.1),
    "lbfgs": lambda weights: LBFGS(weights, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
}


if hasattr(torch.optim, "Muon"):  # since torch 2.9; it mixes the entries of matrices
    OPTIMIZERS["muon"] = lambda weights: torch.optim.Muon([one for one in weights if one.ndim == 2], lr=0.05)


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
    """A checkerboard. Every unit keeps inputs and outputs, and its kept weights go on learning."""
    weights = prunable_parameters(net)
    boards = {name: torch.arange(w.shape[0])[:, None] + torch.arange(w.shape[1]) for name, w in weights.items()}
    return Mask({name: board % 2 == 0 for name, board in boards.items()})


def pruned_entries(net: nn.Module, mask: Mask) -> torch.Tensor:
    parameters = dict(net.named_parameters())
    return torch.cat([parameters[name].detach()[~kept] for name, kept in mask.items()])


def pruned_memories(optimizer: torch.optim.Optimizer, net: nn.Module, mask: Mask) -> list[torch.Tensor]:
    """The optimizer's state of pruned entries."""
    parameters = dict(net.named_parameters())
    return [
        memory[~kept]
        for name, kept in mask.items()
        for memory in optimizer.state[parameters[name]].values()
        if isinstance(memory, torch.Tensor) and memory.shape == kept.shape
    ]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seen=None) -> None:
    """Train some steps. `seen` is called at every forward, also at those of a line search."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        if seen is not None:
            seen()
        loss = mse_loss(net(X), Y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def hold(net: nn.Module, mask: Mask, *optimizers: torch.optim.Optimizer) -> ZeroHold:
    return ZeroHold(dict(net.named_parameters()), mask, optimizers)


def held(made=OPTIMIZERS["adam"], steps: int = 0):
    """A network that has trained some steps and is pruned now, its mask and its optimizer."""
    net = network()
    optimizer, mask = made(net.parameters()), half_of(net)
    train(net, optimizer, steps)
    hold(net, mask, optimizer)
    return net, mask, optimizer


def momentum(weights) -> SGD:
    return SGD(weights, lr=0.1, momentum=0.9)


every_optimizer = pytest.mark.parametrize("made", OPTIMIZERS.values(), ids=OPTIMIZERS)


@every_optimizer
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "fresh"])
def test_pruned_weights_are_zero_at_every_forward(made, warm):
    net, forwards = network(), []
    optimizer, mask = made(net.parameters()), half_of(net)
    train(net, optimizer, 5 if warm else 0)  # momentum would move the pruned weights
    identity = {name: (id(one), one.data_ptr()) for name, one in net.named_parameters()}
    hold(net, mask, optimizer)

    def seen() -> None:
        forwards.append(int(pruned_entries(net, mask).count_nonzero()))

    before = net[0].weight.detach().clone()
    train(net, optimizer, 20, seen)
    seen()
    assert len(forwards) >= 21
    assert set(forwards) == {0}
    kept = mask["0.weight"]
    assert (net[0].weight.detach()[kept] != before[kept]).all()  # the others learn
    assert {name: (id(one), one.data_ptr()) for name, one in net.named_parameters()} == identity


@every_optimizer
def test_after_release_the_zeros_are_lost(made):
    net = network()
    optimizer, mask = made(net.parameters()), half_of(net)
    holds = hold(net, mask, optimizer)
    train(net, optimizer, 2)
    assert not pruned_entries(net, mask).any()
    holds.release()
    assert not pruned_entries(net, mask).any()
    train(net, optimizer, 2)
    assert pruned_entries(net, mask).all()


@every_optimizer
def test_release_leaves_no_hook_behind(made):
    plain, other = network(), network()
    optimizers = [made(plain.parameters()), made(other.parameters())]
    holds = hold(other, Mask.full(prunable_parameters(other)), optimizers[1])
    holds.release()
    holds.release()
    assert not optimizers[1]._optimizer_step_post_hooks
    assert not optimizers[1]._optimizer_step_pre_hooks
    for net, optimizer in zip((plain, other), optimizers, strict=True):
        train(net, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_an_optimizer_has_no_state_of_pruned_weights(name):
    net = network()
    optimizer, mask = OPTIMIZERS[name](net.parameters()), half_of(net)
    train(net, optimizer, 5)
    before = deepcopy(optimizer.state[net[0].weight])
    assert any(memory.any() for memory in pruned_memories(optimizer, net, mask))
    hold(net, mask, optimizer)
    for key, memory in optimizer.state[net[0].weight].items():  # the state of kept weights, and counters, stay
        here = mask["0.weight"] if torch.is_tensor(memory) and memory.shape == mask["0.weight"].shape else ...
        assert torch.equal(torch.as_tensor(memory)[here], torch.as_tensor(before[key])[here])
    for _ in range(3):
        memories = pruned_memories(optimizer, net, mask)
        assert len(memories) >= 2
        # weight decay adds nothing to the gradient of a weight that is zero
        assert not any(memory.any() for memory in memories)
        train(net, optimizer, 2)


def test_the_state_of_lbfgs_is_cleared():
    net = network()
    optimizer = LBFGS(net.parameters(), lr=0.5, max_iter=4)
    train(net, optimizer, 3)
    for afresh in (False, True):
        assert optimizer.state[net[0].weight]["old_dirs"]
        ZeroHold(dict(net.named_parameters()), half_of(net), [optimizer], afresh)
    assert not optimizer.state


def masked_network(net: nn.Module, mask: Mask):
    """The loss of the network that multiplies its weights by the mask: its gradient is the pruned network's."""
    parameters = dict(net.named_parameters())
    product = {name: one * mask[name] if name in mask else one for name, one in parameters.items()}
    return mse_loss(torch.func.functional_call(net, product, (X,)), Y)


def test_clipping_sees_the_gradient_of_the_pruned_network():
    (net, mask, _), reference = held(), network()
    mse_loss(net(X), Y).backward()
    masked_network(reference, mask).backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1), rtol=1e-6)
    unpruned = network()
    mse_loss(unpruned(X), Y).backward()
    assert norm < 0.95 * nn.utils.get_total_norm([one.grad for one in unpruned.parameters()])


def test_training_is_that_of_the_pruned_network():
    (net, mask, optimizer), reference = held(momentum), network()
    train(net, optimizer, 20)
    optimizer = momentum(reference.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        masked_network(reference, mask).backward()
        optimizer.step()
    for name, one in reference.named_parameters():
        expected = one * mask[name] if name in mask else one
        assert torch.allclose(dict(net.named_parameters())[name], expected, atol=1e-6)


def test_accumulated_gradients_stay_zero_at_pruned_weights():
    net = network()
    mask, optimizer = half_of(net), OPTIMIZERS["adamw"](net.parameters())
    mse_loss(net(X), Y).backward()
    hold(net, mask, optimizer)
    assert not net[0].weight.grad[~mask["0.weight"]].any()
    for _ in range(5):
        for part in range(4):
            mse_loss(net(X[part::4]), Y[part::4]).backward()
            assert torch.equal(net[0].weight.grad != 0, mask["0.weight"])
        optimizer.step()
        optimizer.zero_grad()
        assert not pruned_entries(net, mask).any()


def test_every_one_of_several_optimizers_is_held():
    net = network()
    mask = half_of(net)
    optimizers = [AdamW(layer.parameters(), lr=0.05, weight_decay=0.5) for layer in (net[0], net[2])]
    for optimizer in optimizers:
        train(net, optimizer, 3)
    hold(net, mask, *optimizers)
    for optimizer in optimizers * 5:
        train(net, optimizer, 1)
        assert not pruned_entries(net, mask).any()


def test_fill_zeros_values_that_others_wrote():
    # as another library's optimizer or weight averaging does
    net = network()
    mask = half_of(net)
    holds = hold(net, mask)
    with torch.no_grad():
        net[0].weight.fill_(3.0)
    holds.fill()
    assert torch.equal(net[0].weight.detach(), 3.0 * mask["0.weight"])


class Langevin(SGD):
    """Moves weights without a gradient too."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for weight in self.param_groups[0]["params"]:
                weight.add_(0.01)


@pytest.mark.parametrize("made", [momentum, lambda weights: Langevin(weights, lr=0.1)])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_zeros_pruned_weights_without_a_gradient(made, frozen):
    net = network()
    net[0].weight.requires_grad_(not frozen)
    mask, optimizer = half_of(network()), made(net.parameters())
    train(net, optimizer, 2)
    hold(net, mask, optimizer)
    with torch.no_grad():
        net[0].weight.fill_(3.0)
    optimizer.zero_grad()
    net[2](torch.ones(3, 8)).sum().backward()
    assert net[0].weight.grad is None
    optimizer.step()
    assert not pruned_entries(net, mask).any()


VALUES = torch.tensor([1.5, -2.0, 0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42])
LAYOUTS = {
    "contiguous": lambda one: one.contiguous(),
    "channels last": lambda one: one.contiguous(memory_format=torch.channels_last),
    "transposed": lambda one: one.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda one: torch.stack([one, one], -1)[..., 0],
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("filled", LAYOUTS.values(), ids=LAYOUTS)
def test_pruned_entries_are_zero_and_the_others_bit_for_bit_the_same(dtype, weight, filled):
    chance = torch.Generator().manual_seed(0)
    numbers = VALUES[torch.randint(8, (6, 4, 3, 5), generator=chance)].to(dtype)
    kept = torch.rand(numbers.shape, generator=chance) < 0.5
    one = filled(numbers.clone())
    ZeroFill(kept, weight(torch.zeros_like(numbers)))(one)
    expected = torch.where(kept, numbers, torch.zeros((), dtype=dtype))
    assert one.contiguous().view(torch.uint8).tolist() == expected.view(torch.uint8).tolist()


def test_a_gradient_of_another_type_than_the_weight_is_filled():
    kept, grad = torch.tensor([[True, False]]), torch.ones(1, 2, dtype=torch.bfloat16)
    ZeroFill(kept, torch.zeros(1, 2))(grad)
    assert grad.tolist() == [[1.0, 0.0]]


def test_autograd_sees_that_a_tensor_was_filled():
    # otherwise it would compute gradients from values that are gone
    weight = torch.ones(3, requires_grad=True)
    product = weight * weight
    ZeroFill(torch.tensor([True, False, True]), weight)(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_weight_that_is_unfrozen_later_is_clipped_like_the_others():
    net, reference = network(), network()
    net[0].weight.requires_grad_(False)
    mask, optimizer = half_of(network()), Adam([net[2].weight], lr=0.05)
    hold(net, mask, optimizer)
    assert not net[0].weight.requires_grad
    train(net, optimizer, 2)
    assert net[0].weight.grad is None
    net[0].weight.requires_grad_(True)
    optimizer.add_param_group({"params": [net[0].weight], "lr": 0.01, "weight_decay": 0.1})
    reference.load_state_dict(net.state_dict())
    optimizer.zero_grad()
    mse_loss(net(X), Y).backward()
    masked_network(reference, mask).backward()
    norms = [nn.utils.clip_grad_norm_([one[0].weight, one[2].weight], 0.1) for one in (net, reference)]
    assert torch.allclose(*norms, rtol=1e-6)
    for _ in range(3):
        optimizer.step()
        assert not pruned_entries(net, mask).any()
        assert not any(memory.any() for memory in pruned_memories(optimizer, net, mask))
    assert (net[0].weight[mask["0.weight"]] != reference[0].weight[mask["0.weight"]]).all()


def test_a_state_from_before_the_hold_is_filled_when_it_is_loaded():
    net = network()
    mask, optimizer = half_of(net), Adam(net.parameters(), lr=0.05)
    train(net, optimizer, 3)
    dense = deepcopy(optimizer.state_dict())
    hold(net, mask, optimizer)
    optimizer.load_state_dict(dense)
    memories = pruned_memories(optimizer, net, mask)
    assert len(memories) == 4
    assert not any(memory.any() for memory in memories)
    assert optimizer.state[net[0].weight]["exp_avg"].any()


def test_sparse_gradients_are_filled_where_they_have_entries():
    table = nn.Embedding(5, 4, sparse=True)
    kept = (torch.arange(20) % 3 > 0).reshape(5, 4)
    optimizer = SparseAdam(table.parameters(), lr=0.1)
    rows = torch.tensor([1, 1, 3, 4])  # not coalesced
    table(rows).pow(2).sum().backward()
    optimizer.step()
    assert optimizer.state[table.weight]["exp_avg"][~kept].any()
    ZeroHold({"weight": table.weight}, {"weight": kept}, [optimizer])
    before = table.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (table(rows) + 1).pow(2).sum().backward()
        assert table.weight.grad.is_sparse
        dense = table.weight.grad.to_dense()
        assert not dense[~kept].any()
        assert dense[rows][kept[rows]].all()
        optimizer.step()
        assert not table.weight.detach()[~kept].any()
        assert not optimizer.state[table.weight]["exp_avg"][~kept].any()
    assert (table.weight.detach()[rows] != before[rows])[kept[rows]].all()


@pytest.mark.parametrize("fused", [True, False])
def test_with_a_gradient_scaler(fused):
    net, mask, optimizer = held(lambda weights: Adam(weights, lr=0.05, fused=fused), 2)
    scaler, skipped = torch.amp.GradScaler("cpu", init_scale=2.0**10), 0
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(mse_loss(net(X), Y)).backward()
        if step in (1, 4):
            net[0].weight.grad[0, 0] = torch.inf
        before, scale = net[0].weight.detach().clone(), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        stays = torch.equal(before, net[0].weight)
        assert stays == (scaler.get_scale() < scale) == (step in (1, 4))
        skipped += stays
        assert not pruned_entries(net, mask).any()
        assert not any(memory.any() for memory in pruned_memories(optimizer, net, mask))
    assert skipped == 2


def test_a_gradient_that_overflows_at_a_pruned_weight_skips_no_step():
    class Overflows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.where(kept, grad, torch.inf)

    weight = nn.Parameter(noise(4, 4, seed=1))
    kept = torch.eye(4, dtype=torch.bool)
    optimizer, scaler = SGD([weight], lr=0.1), torch.amp.GradScaler("cpu")
    ZeroHold({"weight": weight}, {"weight": kept}, [optimizer])
    before = weight.detach().clone()
    scaler.scale(Overflows.apply(weight).sum()).backward()
    scaler.step(optimizer)
    assert torch.allclose(weight[kept], before[kept] - 0.1)
    assert not weight[~kept].any()


WRITES = {
    "replaced": lambda weight, _: setattr(weight, "grad", torch.ones_like(weight)),
    "nan": lambda weight, kept: setattr(weight, "grad", torch.ones_like(weight).masked_fill(~kept, torch.nan)),
    "in place": lambda weight, _: weight.grad.add_(1.0),
    "reduced": lambda weight, _: weight.grad.data.add_(1.0),  # torch does not count these writes
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_gradient_that_is_written_to_before_the_step_is_filled_again(monkeypatch, write):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: write is WRITES["reduced"])
    net, mask, optimizer = held(momentum)
    kept = mask["0.weight"]
    mse_loss(net(X), Y).backward()
    write(net[0].weight, kept)
    optimizer.step()
    state = optimizer.state[net[0].weight]["momentum_buffer"]
    assert torch.equal(state != 0, kept)
    assert state.isfinite().all()
    assert torch.equal(net[0].weight != 0, kept)


def test_a_step_fills_each_gradient_and_each_weight_once(monkeypatch):
    net, mask, optimizer = held()
    filled, fill = [], ZeroFill.__call__
    monkeypatch.setattr(ZeroFill, "__call__", lambda self, one: (filled.append(one), fill(self, one))[1])
    train(net, optimizer, 3)
    assert len(filled) == 3 * 2 * len(mask)
