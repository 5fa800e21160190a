"""Masks: True is kept, sparsity has one definition, and pruned entries are filled with zero."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_roulette import Mask, apply_mask, sparsity
from lightning_roulette.large.bits import Bits
from lightning_roulette.mask.history import History
from lightning_roulette.mask.mask import breaks, fill_pruned, fits
from tests.support.limits import set_limits
from tests.support.weights import bits_of, every_other, mask_of, odd_weights


@pytest.fixture(params=[1 << 20, 0], ids=["plain", "packed"])
def packed(request, monkeypatch) -> bool:
    """Whether all masks of a test are packed."""
    set_limits(monkeypatch, unpacked_entries=request.param, packed_entries=64, masked_entries=5)
    return request.param == 0


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))


def test_a_mask_that_keeps_all_or_nothing(packed):
    full, nothing = Mask.full(odd_weights()), Mask.nothing(odd_weights())
    assert (full.survivors, full.size, full.sparsity) == (24, 24, 0.0)
    assert (nothing.survivors, nothing.size, nothing.sparsity) == (0, 24, 1.0)
    assert all(kept.all() for kept in full.values())
    assert nothing <= full
    assert all(isinstance(kept, Bits) == packed for kept in full.stored.values())


def test_the_packed_mask_that_keeps_all_takes_one_byte_a_parameter():
    weights = {"a": torch.empty(2**21 + 8), "b": torch.empty(1024, 2048)}
    full = Mask.full(weights)
    assert [kept.packed.untyped_storage().nbytes() for kept in full.stored.values()] == [1, 1]
    assert full.survivors == full.size == 2**22 + 8
    assert full == Mask({name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()})


def test_of_nonzeros_keeps_what_is_not_zero(packed):
    found = Mask.of_nonzeros({"w": nn.Parameter(torch.tensor([0.0, -0.0, 1e-45, math.nan, -3.0]))})
    assert found == mask_of(w=[0, 0, 1, 1, 1])


def test_sparsity_density_and_counts_agree(packed):
    mask = mask_of(a=[1, 0, 0, 0], b=[1, 1, 1, 0], empty=[])
    assert (mask.size, mask.survivors, mask.sparsity) == (8, 4, 0.5)
    assert mask.densities == {"a": 0.25, "b": 0.75, "empty": 0.0}
    assert "4 of 8 weights kept" in repr(mask)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.booleans(), max_size=20), max_size=4))
def test_the_sparsity_of_a_mask_is_that_of_the_weights_it_prunes(layers):
    mask = mask_of(**{f"layer{i}": layer for i, layer in enumerate(layers)})
    weights = {name: torch.full(kept.shape, 2.0) for name, kept in mask.items()}
    fill_pruned(weights, mask)
    total = sum(map(len, layers))
    assert mask.sparsity == sparsity(mask) == sparsity(weights)
    assert mask.sparsity == pytest.approx(sum(not kept for layer in layers for kept in layer) / total if total else 0)
    assert mask.survivors == sum(map(sum, layers))


def test_the_sparsity_of_nothing_is_zero():
    assert sparsity({}) == sparsity({"empty": torch.empty(0)}) == 0.0


def test_a_mask_is_a_mapping_in_the_order_given(packed, monkeypatch):
    kept = {"b": torch.tensor([True, False]), "a": torch.tensor([True])}
    mask = Mask(kept)
    kept["c"] = torch.tensor([True])
    assert mask["b"].tolist() == [True, False]
    monkeypatch.setattr(Bits, "unpacked", lambda _: pytest.fail("unpacked"))
    assert list(mask) == ["b", "a"]
    assert len(mask) == 2
    assert "a" in mask
    assert "c" not in mask


def test_masks_are_equal_by_content(packed):
    assert mask_of(a=[1, 0], b=[1]) == mask_of(b=[1], a=[1, 0])
    for other in (mask_of(a=[1, 1]), mask_of(b=[1, 0]), mask_of(a=[[1, 0]]), {"a": torch.tensor([True, False])}):
        assert mask_of(a=[1, 0]) != other
    assert mask_of(a=[1, 0]).digest == mask_of(a=[1, 0]).digest != mask_of(a=[1, 1]).digest
    with pytest.raises(TypeError, match="unhashable type: 'Mask'"):
        hash(mask_of(a=[1]))


def test_masks_nest(packed):
    thick, thin = mask_of(a=[1, 1, 0], b=[1]), mask_of(a=[0, 1, 0], b=[1])
    assert thin <= thick
    assert thick <= thick
    assert not thick <= thin
    assert not mask_of(a=[0, 0, 1], b=[1]) <= thick
    assert not mask_of(a=[0, 1, 0]) <= thick


def test_a_packed_mask_equals_the_plain_one(monkeypatch):
    tensors = {"a": torch.arange(63).view(21, 3) % 4 == 0, "b": torch.arange(24).view(4, 6).T % 5 > 0}
    plain, thinner = (
        Mask(tensors),
        Mask({name: kept & (torch.arange(3) > 0) for name, kept in {"a": tensors["a"]}.items()}),
    )
    set_limits(monkeypatch, unpacked_entries=0, packed_entries=64)
    packed = Mask(tensors)
    assert isinstance(packed.stored["a"], Bits)
    assert packed == plain
    assert all(torch.equal(packed[name], kept) for name, kept in plain.items())
    assert (packed.survivors, packed.size, packed.densities) == (plain.survivors, plain.size, plain.densities)
    assert packed.nbytes < plain.nbytes
    assert thinner <= Mask({"a": tensors["a"]})
    assert not Mask({"a": tensors["a"]}) <= thinner


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask)), Mask, Mask.cpu])
def test_copies_of_a_mask_are_equal(packed, copied):
    mask = mask_of(a=[1, 0], b=[1])
    assert copied(mask) == mask


# ---- filling and applying


def test_pruned_entries_become_positive_zero_and_kept_entries_keep_their_bits(packed):
    weights = odd_weights()
    before, mask = bits_of(weights), every_other(weights)
    fill_pruned(weights, mask)
    width = {name: weight.element_size() for name, weight in weights.items()}
    for name, after in bits_of(weights).items():
        for entry, kept in enumerate(mask[name].flatten().tolist()):
            part = slice(entry * width[name], (entry + 1) * width[name])
            assert after[part] == (before[name][part] if kept else bytes(width[name]))


def test_applying_keeps_the_identity_and_names_of_parameters(packed):
    net = network()
    before = {name: (id(one), one.data_ptr()) for name, one in net.named_parameters()}
    keys = list(net.state_dict())
    apply_mask(net, {"0.weight": torch.tensor([[True, False], [False, False], [True, True]]).T})
    assert {name: (id(one), one.data_ptr()) for name, one in net.named_parameters()} == before
    assert list(net.state_dict()) == keys
    assert (net[0].weight != 0).tolist() == [[True, False, True], [False, False, True]]
    assert net[2].weight.count_nonzero() == 8
    assert net[0].weight.is_leaf
    assert net[0].weight.requires_grad


def test_a_tied_weight_can_be_named_by_either_name():
    net = network()
    net.add_module("again", net[0])
    apply_mask(net, {"again.weight": torch.zeros(2, 3, dtype=torch.bool)})
    assert net[0].weight.count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "kept", "error", "message"),
    [
        (
            "1.weight",
            torch.zeros(2, 3, dtype=torch.bool),
            ValueError,
            r"the mask names '1.weight', but the module has no such parameter: it has '0.weight'",
        ),
        (
            "2.weight",
            torch.zeros(2, 4, dtype=torch.bool),
            ValueError,
            r"the mask of '2.weight' has shape \(2, 4\), but the parameter has \(4, 2\)",
        ),
        ("2.weight", torch.ones(4, 2), TypeError, "the mask of '2.weight' is torch.float32, but must be torch.bool"),
        ("2.weight", torch.ones(4, 2).byte(), TypeError, "the mask of '2.weight' is torch.uint8, but must be"),
    ],
)
def test_a_mask_that_does_not_fit_changes_nothing(name, kept, error, message):
    net = network()
    before = bits_of(net.state_dict())
    with pytest.raises(error, match=message):
        apply_mask(net, {"0.weight": torch.zeros(2, 3, dtype=torch.bool), name: kept})
    assert bits_of(net.state_dict()) == before


def test_a_module_is_asked_whether_a_mask_fits_and_holds(packed):
    net, kept = network(), torch.tensor([[True, False, True], [False, False, True]])
    assert fits({"0.weight": kept}, net)
    assert not fits({"0.weight": kept.T}, net)
    assert not fits({"1.weight": kept}, net)
    assert breaks({"0.weight": kept}, net)
    apply_mask(net, {"0.weight": kept})
    assert not breaks({"0.weight": kept}, net)
    assert not breaks(Mask({"0.weight": kept}), net)


# ---- files


def saved(path, wrap=lambda state: state) -> Mask:
    """Store a history of two levels; its mask."""
    mask = mask_of(a=[[1, 0], [0, 0]])
    history = History.of_dense(mask).pruned(mask_of(a=[[1, 1], [0, 0]])).pruned(mask)
    torch.save(wrap(history.state()), path)
    return mask


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {}, "callbacks": {"Other": {"monitor": "val_acc"}, "Roulette": state}},
    ],
    ids=["alone", "checkpoint"],
)
def test_a_mask_is_read_and_applied_from_a_file(packed, wrap, tmp_path):
    mask = saved(tmp_path / "stored.ckpt", wrap)
    assert Mask.load(tmp_path / "stored.ckpt") == Mask.load(str(tmp_path / "stored.ckpt")) == mask
    net = nn.Module()
    net.a = nn.Parameter(torch.ones(2, 2))
    apply_mask(net, tmp_path / "stored.ckpt")
    assert Mask.of_nonzeros(dict(net.named_parameters())) == mask


def test_the_mask_of_a_distributed_checkpoint_is_read_from_its_folder(tmp_path):
    assert saved(tmp_path / "meta.pt") == Mask.load(tmp_path)


@pytest.mark.parametrize(
    "stored", [{}, {"state_dict": {}}, {"callbacks": {"EarlyStopping": {"wait_count": 0}}}, torch.ones(3)]
)
def test_a_file_without_a_mask_is_refused(stored, tmp_path):
    torch.save(stored, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt holds no mask of RouletteWheelPruning. Pass its pruned.ckpt"):
        Mask.load(tmp_path / "other.ckpt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        Mask.load(tmp_path / "nowhere.ckpt")
