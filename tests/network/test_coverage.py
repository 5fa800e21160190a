"""How much of a network is prunable, and what is skipped."""

from __future__ import annotations

import torch
from torch import nn

from lightning_roulette import skipped_parameters
from lightning_roulette.network.coverage import coverage_of, largest_class
from lightning_roulette.report.records import Skipped
from tests.support.networks import MetricOf


def network() -> nn.ModuleDict:
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 6),
            "body": nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)),
            "frozen": nn.Linear(6, 2).requires_grad_(False),
            "head": nn.Linear(6, 10),
            "metric": MetricOf(nn.Linear(50, 50)),
            "lazy": nn.LazyLinear(3),
        }
    )
    net["body"][2].weight.data = net["body"][0].weight.data.t()
    return net


def test_weights_in_matrices_are_counted_once_and_grouped_by_reason():
    net = network()
    found = coverage_of(net, skipped_parameters(net) | {"head.weight": "unused by validation"})
    assert (found.matrices, found.prunable) == (60 + 36 + 12 + 60, 36)
    assert found.skipped == (
        Skipped(("embed.weight",), 60, "weight of Embedding"),
        Skipped(("head.weight",), 60, "unused by validation"),
        Skipped(("body.2.weight",), 36, "tied to body.0.weight"),
        Skipped(("frozen.weight",), 12, "frozen"),
    )
    assert found.frozen == 12
    assert found.sentence == (
        "36 of 168 weights in matrices are prunable (21.4%). Skipped: 60 in embed.weight (weight of Embedding); "
        "60 in head.weight (unused by validation); 36 in body.2.weight (tied to body.0.weight); 12 in frozen.weight "
        "(frozen)."
    )


def test_ties_to_several_weights_are_one_group():
    net = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    for first in (0, 2):
        net[first + 1].weight.data = net[first].weight.data
    found = coverage_of(net, skipped_parameters(net))
    assert found.skipped == (Skipped(("1.weight", "3.weight"), 18, "tied to other weights"),)
    assert (found.matrices, found.share) == (18, 1.0)


def test_a_head_that_is_tied_to_an_embedding_is_named():
    net = nn.ModuleDict({"embed": nn.Embedding(10, 6), "other": nn.Embedding(2, 6), "head": nn.Linear(6, 10)})
    net["head"].weight = net["embed"].weight
    assert coverage_of(net, skipped_parameters(net)).skipped == (
        Skipped(("embed.weight",), 60, "weight of Embedding, also named head.weight"),
        Skipped(("other.weight",), 12, "weight of Embedding"),
    )


def test_a_network_without_matrices_has_no_share_to_miss():
    found = coverage_of(nn.LayerNorm(3), {"weight": "weight of LayerNorm", "bias": "bias of LayerNorm"})
    assert (found.matrices, found.share, found.skipped) == (0, 1.0, ())
    assert found.sentence == "0 of 0 weights in matrices are prunable (100.0%)."


def test_the_class_with_most_weights_is_found():
    net = nn.Sequential(nn.Embedding(10, 2), nn.Bilinear(4, 4, 4), nn.Linear(3, 3))
    kind, share, names = largest_class(net)
    assert (kind, names) == (nn.Bilinear, ["1.weight"])
    assert share == 64 / (20 + 64 + 9)
    assert largest_class(nn.LayerNorm(3)) is None


def test_only_five_reasons_are_listed():
    net = nn.ParameterDict({name: torch.ones(2, size) for size, name in enumerate("abcdef", start=1)})
    found = coverage_of(net, {name: f"reason {name}" for name in "abcdef"})
    assert found.sentence.endswith("4 in b (reason b); 2 for other reasons.")
