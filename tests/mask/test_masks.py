"""Masks: True is kept, they nest, one definition of sparsity, and a lent network comes back bit for bit."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_roulette import Mask, apply_mask, sparsity
from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import fill_pruned
from lightning_roulette.network.lending import applied, surely
from tests.support.limits import set_limits


def mask_of(**kept) -> Mask:
    return Mask({name: torch.tensor(values, dtype=torch.bool) for name, values in kept.items()})


def bits_of(tensors) -> dict[str, bytes]:
    return {name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def odd_weights(times: int = 1) -> dict[str, torch.Tensor]:
    """Everything that a product with a mask, or a copy through another type, would not give back; so many times."""
    payload = torch.tensor([0x7FC01234, -1, 0x7F800000, -(2**31), 1, 0x3F800000], dtype=torch.int32)
    half = torch.tensor([0x7FC3, -32768, 1, 0x3F80], dtype=torch.int16)
    return {
        "single": payload.repeat(times).view(torch.float32).reshape(2, -1),
        "brain": half.repeat(times).view(torch.bfloat16),
        "half": half.repeat(times).view(torch.float16),
        "double": torch.tensor([math.nan, -0.0, 5e-324, math.inf], dtype=torch.float64).repeat(times),
        "turned": torch.arange(6.0 * times).view(2, -1).T,
    }


# tensors of a few entries, and of more than a million
few_and_many = pytest.mark.parametrize("times", [1, 2**18 + 1])


def every_other(weights) -> Mask:
    return Mask({n: torch.arange(w.numel()).view(w.shape) % 2 == 0 for n, w in weights.items()})


def test_true_means_kept():
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    module = nn.Module()
    module.register_parameter("weight", weight)
    apply_mask(module, mask_of(weight=[1, 0, 1]))
    assert weight.tolist() == [1.0, 0.0, 3.0]


def test_full_keeps_everything():
    full = Mask.full(odd_weights())
    assert (full.survivors, full.size, full.sparsity) == (24, 24, 0.0)
    assert all(kept.all() for kept in full.values())


def test_of_nonzeros_keeps_what_is_not_zero():
    found = Mask.of_nonzeros({"w": nn.Parameter(torch.tensor([0.0, -0.0, 1e-45, math.nan, -3.0]))})
    assert found == mask_of(w=[0, 0, 1, 1, 1])


def test_sparsity_density_and_counts_agree():
    mask = mask_of(a=[1, 0, 0, 0], b=[1, 1, 1, 0], empty=[])
    assert (mask.size, mask.survivors, mask.sparsity) == (8, 4, 0.5)
    assert mask.densities == {"a": 0.25, "b": 0.75, "empty": 0.0}
    assert "4 of 8 weights kept" in repr(mask)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.booleans(), max_size=20), max_size=4))
def test_sparsity_of_a_mask_is_that_of_the_weights_it_prunes(layers):
    mask = mask_of(**{f"layer{i}": layer for i, layer in enumerate(layers)})
    weights = {name: torch.full(kept.shape, 2.0) for name, kept in mask.items()}
    fill_pruned(weights, mask)
    total = sum(map(len, layers))
    assert mask.sparsity == sparsity(mask) == sparsity(weights)
    assert mask.sparsity == pytest.approx(sum(not kept for layer in layers for kept in layer) / total if total else 0)
    assert mask.survivors == sum(map(sum, layers))


def test_a_mask_is_a_mapping_in_the_order_given():
    mask = mask_of(b=[1, 0], a=[1])
    assert list(mask) == ["b", "a"]
    assert len(mask) == 2
    assert mask["b"].tolist() == [True, False]
    assert "c" not in mask


def test_masks_are_equal_by_content():
    assert mask_of(a=[1, 0], b=[1]) == mask_of(b=[1], a=[1, 0])
    assert mask_of(a=[1, 0]) != mask_of(a=[1, 1])
    assert mask_of(a=[1, 0]) != mask_of(b=[1, 0])
    assert mask_of(a=[1, 0]) != mask_of(a=[[1, 0]])
    assert mask_of(a=[1]) != {"a": torch.tensor([True])}


def test_masks_nest():
    thick, thin = mask_of(a=[1, 1, 0], b=[1]), mask_of(a=[0, 1, 0], b=[1])
    assert thin <= thick
    assert thick <= thick
    assert not thick <= thin
    assert not mask_of(a=[0, 0, 1], b=[1]) <= thick
    assert not mask_of(a=[0, 1, 0]) <= thick


def test_a_mask_is_unhashable():
    with pytest.raises(TypeError, match="unhashable type: 'Mask'"):
        hash(mask_of(a=[1]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_a_mask_of_numbers_is_refused(dtype):
    with pytest.raises(TypeError, match=f"the mask of 'b' is {dtype}, but must be torch.bool"):
        Mask({"a": torch.tensor([True]), "b": torch.ones(2, dtype=dtype)})


def test_a_mask_is_not_changed_through_the_dict_it_was_made_from():
    kept = {"a": torch.tensor([True, False])}
    mask = Mask(kept)
    kept["b"] = torch.tensor([True])
    assert list(mask) == ["a"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))])
def test_masks_can_be_copied_and_pickled(copied):
    mask = mask_of(a=[1, 0], b=[1])
    assert copied(mask) == mask


def test_pruned_entries_become_positive_zero_whatever_they_were():
    weights = {"w": torch.tensor([math.inf, -math.inf, math.nan, -0.0, -5.0, 7.0])}
    fill_pruned(weights, mask_of(w=[0, 0, 0, 0, 0, 1]))
    assert weights["w"].tolist() == [0, 0, 0, 0, 0, 7]
    assert not weights["w"].signbit().any()


def test_kept_entries_keep_their_bits():
    weights = odd_weights()
    before, mask = bits_of(weights), every_other(weights)
    fill_pruned(weights, mask)
    width = {name: weight.element_size() for name, weight in weights.items()}
    for name, after in bits_of(weights).items():
        for entry, kept in enumerate(mask[name].flatten().tolist()):
            part = slice(entry * width[name], (entry + 1) * width[name])
            assert after[part] == (before[name][part] if kept else bytes(width[name]))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))


def test_applying_keeps_the_identity_and_names_of_parameters():
    net = network()
    before = {name: (id(one), one.data_ptr()) for name, one in net.named_parameters()}
    keys = list(net.state_dict())
    apply_mask(net, {"0.weight": torch.tensor([[True, False, True], [False, False, True]])})
    assert {name: (id(one), one.data_ptr()) for name, one in net.named_parameters()} == before
    assert list(net.state_dict()) == keys
    assert net[0].weight.count_nonzero() == 3
    assert net[2].weight.count_nonzero() == 8


def test_applying_needs_no_grad_mode_and_leaves_the_graph_alone():
    net = network()
    apply_mask(net, {"0.weight": torch.zeros(2, 3, dtype=torch.bool)})
    assert net[0].weight.is_leaf
    assert net[0].weight.requires_grad
    assert net[0].weight.grad_fn is None


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("1.weight", (2, 3), r"the mask names '1.weight', but the module has no such parameter: it has '0.weight'"),
        ("2.weight", (2, 4), r"the mask of '2.weight' has shape \(2, 4\), but the parameter has \(4, 2\)"),
    ],
)
def test_a_mask_of_another_network_changes_nothing(name, shape, message):
    net = network()
    before = bits_of(net.state_dict())
    misfit = {"0.weight": torch.zeros(2, 3, dtype=torch.bool), name: torch.zeros(shape, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        apply_mask(net, misfit)
    assert bits_of(net.state_dict()) == before


def test_a_mask_of_numbers_changes_nothing():
    net = network()
    before = bits_of(net.state_dict())
    with pytest.raises(TypeError, match=r"must be torch\.bool"):
        apply_mask(net, {"0.weight": torch.zeros(2, 3, dtype=torch.bool), "2.weight": torch.ones(4, 2)})
    assert bits_of(net.state_dict()) == before


def test_a_tied_weight_can_be_named_by_either_name():
    net = network()
    net.add_module("again", net[0])
    apply_mask(net, {"again.weight": torch.zeros(2, 3, dtype=torch.bool)})
    assert net[0].weight.count_nonzero() == 0


@few_and_many
def test_a_network_is_pruned_inside_the_block_and_back_after_it(times):
    weights = odd_weights(times)
    before, mask = bits_of(weights), every_other(weights)
    with applied(mask, weights):
        for name, weight in weights.items():
            assert bits_of({name: weight[~mask[name]]})[name] == bytes(int((~mask[name]).sum()) * weight.element_size())
    assert bits_of(weights) == before


@few_and_many
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_a_network_is_given_back_after_an_error(error, times):
    weights = odd_weights(times)
    before = bits_of(weights)

    def candidate() -> None:
        with applied(every_other(weights), weights):
            assert bits_of(weights) != before
            raise error

    with pytest.raises(error):
        candidate()
    assert bits_of(weights) == before


@few_and_many
def test_a_network_is_given_back_when_pruning_it_fails_halfway(monkeypatch, times):
    weights, fill, filled = odd_weights(times), torch.Tensor.masked_fill_, []
    before = bits_of(weights)

    def interrupted(tensor, where, value):
        filled.append(fill(tensor, where, value).count_nonzero())
        if len(filled) == 3:
            raise KeyboardInterrupt
        return tensor

    monkeypatch.setattr(torch.Tensor, "masked_fill_", interrupted)
    mask = Mask({name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in weights.items()})
    with pytest.raises(KeyboardInterrupt), applied(mask, weights):
        pytest.fail("the block must not be entered")
    assert filled == [0, 0, 0]
    assert bits_of(weights) == before


@pytest.mark.parametrize("small", [0, 4, 1 << 20])
def test_what_is_set_aside_whole_and_what_in_part_both_come_back(monkeypatch, small):
    set_limits(monkeypatch, unpacked_entries=small)
    weights = odd_weights()
    before, mask = bits_of(weights), every_other(weights)
    with applied(mask, weights):
        assert all(not weights[name][~kept].any() for name, kept in mask.items())
    assert bits_of(weights) == before


def test_blocks_can_be_nested():
    weights = {"w": torch.arange(1.0, 7.0)}
    with applied(mask_of(w=[1, 1, 1, 0, 0, 0]), weights):
        with applied(mask_of(w=[1, 0, 1, 0, 1, 0]), weights):
            assert weights["w"].tolist() == [1, 0, 3, 0, 0, 0]
        assert weights["w"].tolist() == [1, 2, 3, 0, 0, 0]
    assert weights["w"].tolist() == [1, 2, 3, 4, 5, 6]


def test_tied_parameters_are_given_back():
    shared = nn.Parameter(torch.arange(1.0, 5.0))
    weights = {"first": shared, "second": shared}
    with applied(mask_of(first=[1, 0, 1, 1], second=[1, 0, 0, 1]), weights):
        assert shared.tolist() == [1, 0, 0, 4]
    assert shared.tolist() == [1, 2, 3, 4]


def test_lending_keeps_what_training_needs():
    weight = nn.Parameter(torch.arange(1.0, 5.0))
    weight.grad = torch.ones(4)
    identity = (id(weight), weight.data_ptr(), id(weight.grad))
    with applied(mask_of(w=[1, 0, 0, 1]), {"w": weight}):
        assert (id(weight), weight.data_ptr(), id(weight.grad)) == identity
    assert (id(weight), weight.data_ptr(), id(weight.grad)) == identity
    assert weight.requires_grad
    assert weight.grad.tolist() == [1, 1, 1, 1]


def test_an_interrupted_action_is_done_again_before_the_interrupt_goes_on():
    calls = []

    def action() -> None:
        calls.append("begun")
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append("done")

    with pytest.raises(KeyboardInterrupt):
        surely(action)
    assert calls == ["begun", "begun", "done"]


def nested_masks(levels: int, size: int = 700) -> list[Mask]:
    """Masks of levels 0 to `levels`, each two weights thinner than the one before, in two layers."""
    order = np.random.default_rng(3).permutation(2 * size)
    masks = []
    for level in range(levels + 1):
        kept = torch.ones(2 * size, dtype=torch.bool)
        kept[torch.from_numpy(order[: 2 * level])] = False
        masks.append(Mask({"a": kept[:size].view(-1, 7), "b": kept[size:]}))
    return masks


def history_of(masks: list[Mask]) -> History:
    history = History.of_dense(masks[0])
    for mask in masks[1:]:
        history = history.pruned(mask)
    return history


@pytest.mark.parametrize("levels", [0, 1, 5, 255, 256, 300])
def test_every_level_can_be_had_again_from_a_checkpoint(levels, tmp_path):
    masks = nested_masks(levels)
    torch.save(history_of(masks).state(), tmp_path / "history.pt")
    history = History.from_state(torch.load(tmp_path / "history.pt", weights_only=True))
    assert history.level == levels
    assert [history.mask_at(level) for level in range(levels + 1)] == masks
    assert history.mask == history.cpu().mask == masks[-1]


def test_a_restored_history_can_grow_on():
    masks = nested_masks(260)
    history = History.from_state(history_of(masks[:255]).state())
    for mask in masks[255:]:
        history = history.pruned(mask)
    assert [history.mask_at(level) for level in (0, 254, 255, 256, 260)] == [masks[n] for n in (0, 254, 255, 256, 260)]


@pytest.mark.parametrize(("deepest", "winner"), [(5, 0), (5, 3), (5, 5), (300, 2), (300, 260)])
def test_a_winner_that_is_not_the_last_level_keeps_the_levels_after_it(deepest, winner, tmp_path):
    masks = nested_masks(deepest)
    torch.save(history_of(masks).won_by(winner).state(), tmp_path / "history.pt")
    history = History.from_state(torch.load(tmp_path / "history.pt", weights_only=True))
    assert (history.level, history.deepest) == (winner, deepest)
    assert (history.cpu().level, history.cpu().deepest) == (winner, deepest)
    assert history.mask == history.cpu().mask == Mask.load(tmp_path / "history.pt") == masks[winner]
    assert [history.mask_at(level) for level in range(deepest + 1)] == masks
    with pytest.raises(ValueError, match=rf"level is {deepest + 1}, but must lie between 0 \(dense\) and {deepest}"):
        history.mask_at(deepest + 1)


def test_naming_a_winner_changes_no_other_history():
    history = history_of(nested_masks(4))
    assert history.won_by(1).won_by(4).mask == history.mask == nested_masks(4)[4]
    assert (history.level, history.deepest) == (4, 4)


def test_a_history_grows_after_its_last_level_whoever_won():
    masks = nested_masks(4)
    history = history_of(masks[:4]).won_by(1).pruned(masks[4])
    assert (history.level, history.deepest) == (4, 4)
    assert [history.mask_at(level) for level in range(5)] == masks


def test_a_short_history_takes_one_byte_a_weight():
    assert {at.dtype for at in history_of(nested_masks(255)).state()["pruned_at"].values()} == {torch.uint8}
    assert {at.dtype for at in history_of(nested_masks(256)).state()["pruned_at"].values()} == {torch.int16}


@pytest.mark.parametrize("level", [-1, 4])
def test_a_level_that_never_was_is_refused(level):
    with pytest.raises(ValueError, match=rf"level is {level}, but must lie between 0 \(dense\) and 3"):
        history_of(nested_masks(3)).mask_at(level)


@pytest.mark.parametrize("where", ["alone", "checkpoint"])
def test_a_mask_is_read_from_a_file(where, tmp_path):
    masks = nested_masks(4)
    state = history_of(masks).state()
    other = {"monitor": "val_acc"}
    stored = state if where == "alone" else {"state_dict": {}, "callbacks": {"Other": other, "Roulette": state}}
    torch.save(stored, tmp_path / "stored.ckpt")
    assert Mask.load(tmp_path / "stored.ckpt") == Mask.load(str(tmp_path / "stored.ckpt")) == masks[-1]


def test_a_mask_is_applied_from_a_file(tmp_path):
    net, masks = nn.Module(), nested_masks(4)
    net.a, net.b = nn.Parameter(torch.ones(100, 7)), nn.Parameter(torch.ones(700))
    torch.save(history_of(masks).state(), tmp_path / "mask.pt")
    apply_mask(net, tmp_path / "mask.pt")
    assert Mask.of_nonzeros(dict(net.named_parameters())) == masks[-1]


@pytest.mark.parametrize("stored", [{}, {"state_dict": {}}, {"callbacks": {"EarlyStopping": {"wait_count": 0}}}])
def test_a_file_without_a_mask_is_refused(stored, tmp_path):
    torch.save(stored, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt holds no mask of RouletteWheelPruning. Pass its pruned.ckpt"):
        Mask.load(tmp_path / "other.ckpt")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds no mask"):
        Mask.load(tmp_path / "tensor.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        Mask.load(tmp_path / "nowhere.ckpt")


def test_sparsity_of_nothing_is_zero():
    assert sparsity({}) == sparsity({"empty": torch.empty(0)}) == 0.0
