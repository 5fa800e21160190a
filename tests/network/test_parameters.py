"""Prunable parameters of every kind of module, and the reasons for the others."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_roulette import Mask, apply_mask, prunable_parameters, skipped_parameters
from lightning_roulette.network.parameters import aliases, has_lazy_parameters
from tests.support.networks import MetricOf


def old_weight_norm(layer: nn.Module, name: str = "weight") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, name)


class Zoo(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)
        self.up1 = nn.ConvTranspose1d(2, 2, 1)
        self.up2 = nn.ConvTranspose2d(2, 2, 1)
        self.up3 = nn.ConvTranspose3d(2, 2, 1)
        self.batch_norm, self.layer_norm = nn.BatchNorm2d(2), nn.LayerNorm((3, 2))
        self.embedding = nn.Embedding(5, 3)
        self.tied_embedding, self.tied_head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.tied_head.weight = self.tied_embedding.weight
        self.twin1, self.twin2 = nn.Linear(3, 3), nn.Linear(3, 3)
        self.twin2.weight = self.twin1.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross_attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)
        self.lstm = nn.LSTM(3, 4, proj_size=2, bidirectional=True)
        self.gru_cell = nn.GRUCell(3, 4)
        self.normed = parametrizations.weight_norm(nn.Linear(3, 2))
        self.old_normed = old_weight_norm(nn.Linear(3, 2))
        self.pruned = prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5)
        self.lazy = nn.LazyLinear(2)
        self.meta = nn.Linear(3, 2, device="meta")
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.complex = nn.Linear(3, 2, dtype=torch.complex64)
        self.integer = nn.Linear(3, 2, bias=False)
        self.integer.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
        self.metric = MetricOf(nn.Linear(3, 2))
        self.compiled = torch.compile(nn.Linear(3, 2), backend="eager")
        self.half = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.own = nn.Parameter(torch.ones(3, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is nothing to initialise
            self.empty = nn.Linear(0, 2)


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return Zoo()


SOURCE = "torch computes another tensor from it: remove prune, weight_norm or spectral_norm"
NAMES = """
    linear.weight conv1.weight conv2.weight conv3.weight up1.weight up2.weight up3.weight twin1.weight
    attention.in_proj_weight attention.out_proj.weight cross_attention.q_proj_weight
    cross_attention.k_proj_weight cross_attention.v_proj_weight cross_attention.out_proj.weight
    lstm.weight_ih_l0 lstm.weight_hh_l0 lstm.weight_hr_l0 lstm.weight_ih_l0_reverse lstm.weight_hh_l0_reverse
    lstm.weight_hr_l0_reverse gru_cell.weight_ih gru_cell.weight_hh compiled._orig_mod.weight half.weight
"""
PRUNABLE = NAMES.split()
REASONS = {
    "own of Zoo": "own",
    "bias of Linear": "linear.bias twin2.bias",
    "bias of Conv2d": "conv2.bias",
    "weight of BatchNorm2d": "batch_norm.weight",
    "weight of LayerNorm": "layer_norm.weight",
    "weight of Embedding": "embedding.weight tied_embedding.weight",
    "in_proj_bias of MultiheadAttention": "attention.in_proj_bias",
    "bias of NonDynamicallyQuantizableLinear": "attention.out_proj.bias",
    "bias_k of MultiheadAttention": "cross_attention.bias_k",
    "bias_ih_l0 of LSTM": "lstm.bias_ih_l0",
    "bias_hh of GRUCell": "gru_cell.bias_hh",
    "parametrised: another tensor is computed from it": "normed.parametrizations.weight.original0"
    " normed.parametrizations.weight.original1",
    SOURCE: "old_normed.weight_g old_normed.weight_v pruned.weight_orig",
    "lazy: it has no shape yet": "lazy.weight lazy.bias",
    "on the meta device: it has no values": "meta.weight",
    "empty": "empty.weight",
    "frozen": "frozen.weight",
    "quantised or complex": "complex.weight integer.weight",
    "belongs to a metric": "metric.net.weight metric.net.bias",
}
SKIPPED = {name: reason for reason, names in REASONS.items() for name in names.split()}


def test_weights_of_the_documented_layers_are_prunable(zoo):
    found = prunable_parameters(zoo)
    assert list(found) == PRUNABLE
    assert all(found[name] is dict(zoo.named_parameters())[name] for name in PRUNABLE)


@pytest.mark.parametrize(("name", "reason"), SKIPPED.items())
def test_a_skipped_parameter_has_its_reason(zoo, name, reason):
    assert skipped_parameters(zoo)[name] == reason


@pytest.mark.parametrize("patterns", [{}, {"include": ["*"]}, {"exclude": ["*weight*"]}])
def test_every_parameter_is_either_prunable_or_skipped(zoo, patterns):
    found, skipped = prunable_parameters(zoo, **patterns), skipped_parameters(zoo, **patterns)
    assert not found.keys() & skipped.keys()
    assert found.keys() | skipped.keys() == dict(zoo.named_parameters()).keys()
    assert all(skipped.values())


def test_a_tied_weight_counts_once_under_its_first_name(zoo):
    assert "twin2.weight" not in prunable_parameters(zoo)
    assert "twin2.weight" not in skipped_parameters(zoo)
    assert aliases(zoo)["twin1.weight"] == ["twin1.weight", "twin2.weight"]
    assert aliases(zoo)["linear.weight"] == ["linear.weight"]


def test_a_head_tied_to_an_embedding_is_skipped_whichever_comes_first():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    for order in ((head, embedding), (embedding, head)):
        assert skipped_parameters(nn.Sequential(*order)) == {"0.weight": "weight of Embedding"}


def test_a_layer_used_twice_counts_once():
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(prunable_parameters(net)) == ["0.weight"]
    assert aliases(net) == {"0.weight": ["0.weight", "2.weight"], "0.bias": ["0.bias", "2.bias"]}


class Scaled(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        *((layer, {"weight_ih_l0", "weight_hh_l0"}) for layer in (nn.RNN(3, 4), nn.GRU(3, 4))),
        *((layer, {"weight_ih", "weight_hh"}) for layer in (nn.RNNCell(3, 4), nn.LSTMCell(3, 4))),
        (Scaled(3, 2), {"weight"}),
    ],
)
def test_recurrent_weights_and_those_of_subclasses_are_prunable(layer, names):
    assert prunable_parameters(layer).keys() == names


@pytest.mark.parametrize(
    ("change", "layer", "weight", "prunable", "skipped"),
    [
        (old_weight_norm, nn.LSTM(3, 4), "weight_hh_l0", "weight_ih_l0", "{}_g"),
        (old_weight_norm, nn.LSTM(3, 4), "weight_hh_l0", "weight_ih_l0", "{}_v"),
        (parametrizations.weight_norm, nn.LSTM(3, 4), "weight_hh_l0", "weight_ih_l0", "parametrizations.{}.original0"),
        (prune.random_unstructured, nn.LSTM(3, 4), "weight_ih_l0", "weight_hh_l0", "{}_orig"),
        (prune.random_unstructured, nn.MultiheadAttention(4, 2), "in_proj_weight", "out_proj.weight", "{}_orig"),
    ],
)
def test_the_source_of_a_computed_weight_is_skipped(change, layer, weight, prunable, skipped):
    change(layer, weight, **({"amount": 0.5} if change is prune.random_unstructured else {}))
    assert list(prunable_parameters(layer)) == [prunable]
    assert skipped.format(weight) in skipped_parameters(layer)


@pytest.mark.parametrize(
    ("include", "names"),
    [
        (["linear.bias"], ["linear.bias"]),
        (["embedding.weight"], ["embedding.weight"]),
        (["frozen.*"], ["frozen.weight", "frozen.bias"]),
        (["layer_norm.weight", "batch_norm.bias"], ["batch_norm.bias", "layer_norm.weight"]),
        (["twin2.weight"], ["twin1.weight"]),  # by its other name
        (["tied_head.weight"], ["tied_embedding.weight"]),
        (["own"], ["own"]),
        (["conv?.weight"], ["conv1.weight", "conv2.weight", "conv3.weight"]),
        (["*.weight_h[hr]_l0"], ["lstm.weight_hh_l0", "lstm.weight_hr_l0"]),
    ],
)
def test_include_replaces_the_default(zoo, include, names):
    found = prunable_parameters(zoo, include=include)
    assert list(found) == names
    assert skipped_parameters(zoo, include=include)["up1.weight"] == "not included"


@pytest.mark.parametrize("name", [n for n, why in SKIPPED.items() if "of" not in why.split() and why != "frozen"])
def test_include_cannot_override_these_reasons(zoo, name):
    assert prunable_parameters(zoo, include=[name]) == {}
    assert skipped_parameters(zoo, include=[name])[name] == SKIPPED[name]


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        (["linear.*"], {"linear.weight"}),
        (["twin2.weight"], {"twin1.weight"}),
        (["*lstm*", "gru_cell.weight_ih"], {name for name in PRUNABLE if "lstm" in name} | {"gru_cell.weight_ih"}),
        (["linear.bias"], set()),
    ],
)
def test_exclude_subtracts(zoo, exclude, gone):
    assert list(prunable_parameters(zoo, exclude=exclude)) == [name for name in PRUNABLE if name not in gone]
    assert all(skipped_parameters(zoo, exclude=exclude)[name] == "excluded" for name in gone)


def test_exclude_also_subtracts_from_include(zoo):
    found = prunable_parameters(zoo, include=["conv*", "up1.*"], exclude=["*.bias", "conv2.*"])
    assert list(found) == ["conv1.weight", "conv3.weight", "up1.weight"]


@pytest.mark.parametrize("function", [prunable_parameters, skipped_parameters])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_its_closest(zoo, function, argument):
    with pytest.raises(ValueError, match=f"{argument} has the pattern 'linaer.weight', which matches no") as caught:
        function(zoo, **{argument: ["conv1.*", "linaer.weight"]})
    assert "'linear.weight'" in str(caught.value)


@pytest.mark.parametrize(
    ("net", "patterns", "error", "message"),
    [
        (nn.ReLU(), ["*.weight"], ValueError, "Names like it: none"),
        (nn.Linear(3, 2), ["WEIGHT"], ValueError, "include has the pattern 'WEIGHT'"),  # patterns are case-sensitive
        (nn.Linear(3, 2), "w*", TypeError, "include"),  # a string is not a list of patterns
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(net, patterns, error, message):
    with pytest.raises(error, match=message):
        prunable_parameters(net, include=patterns)


def test_a_module_without_parameters_has_none():
    assert prunable_parameters(nn.ReLU()) == skipped_parameters(nn.ReLU()) == aliases(nn.ReLU()) == {}


def test_lazy_parameters_are_found_until_they_have_a_shape():
    net = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    assert has_lazy_parameters(net)
    net(torch.ones(1, 3))
    assert not has_lazy_parameters(net)
    assert list(prunable_parameters(net)) == ["0.weight", "1.weight"]


def test_prunable_weights_can_be_pruned(zoo):
    weights = prunable_parameters(zoo)
    kept = {name: torch.arange(one.numel()).view(one.shape) % 2 == 0 for name, one in weights.items()}
    apply_mask(zoo, kept)
    assert Mask.of_nonzeros(weights) <= Mask(kept)
    assert weights["lstm.weight_hh_l0"].count_nonzero() == math.ceil(weights["lstm.weight_hh_l0"].numel() / 2)


def test_weights_of_eight_bits_are_skipped():
    layer = nn.Linear(3, 2).to(torch.float8_e4m3fn)
    assert not prunable_parameters(layer)
    assert "quantised" in skipped_parameters(layer)["weight"]
