"""Searches whose candidates lose whole units."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lightning_roulette import (
    Calibration,
    Candidate,
    LeastSquares,
    Mask,
    Reduction,
    SearchReport,
    StopReason,
    Tree,
    Wheel,
    search,
)
from lightning_roulette.judge.evaluator import Evaluator
from lightning_roulette.report.records import Scores
from lightning_roulette.search.gradual import Cuts, Gradual
from lightning_roulette.wheel.units.units import Cost
from tests.support.evaluators import Steps
from tests.support.units import hidden_units, perceptron

NET = perceptron((6, 12, 10, 3), seed=1)
WEIGHTS = {name: one.detach() for name, one in NET.named_parameters() if name.endswith("weight")}
POSITIONS = {"0.weight": 4.0, "2.weight": 2.0, "4.weight": 1.0}
MULTIPLY_ADDS = Cost("multiply_adds", POSITIONS, fixed=10.0)
UNITS = hidden_units(NET, multiply_adds=MULTIPLY_ADDS)
DEAR = hidden_units(NET, MULTIPLY_ADDS, MULTIPLY_ADDS)
INPUTS = torch.randn(200, 6, generator=torch.Generator().manual_seed(2))
NEURON = Wheel(unit="neuron")


class Likeness(Evaluator):
    """How close the outputs are to those of the dense network."""

    folds = 4

    def __init__(self, net=NET, inputs=INPUTS) -> None:
        self.log, self.net, self.inputs = [], net, inputs
        with torch.no_grad():
            self.dense = net(inputs)

    @torch.no_grad()
    def __call__(self, candidate, folds) -> Scores:
        self.log.append(candidate.mask)
        some = slice(50 * min(folds), 50 * (max(folds) + 1))
        outputs = torch.func.functional_call(self.net, candidate.weights, (self.inputs[some],))
        score = -float((outputs - self.dense[some]).square().mean())
        return Scores(rank=score, score=score)


def searched(**changes):
    given = {"wheel": NEURON, "units": UNITS, "tolerance": math.inf, "branches": 5, "seed": 3}
    return search(WEIGHTS, Likeness(), **(given | changes))


def dead(mask: Mask) -> bool:
    """Whether each row of a hidden layer has gone exactly if the column that reads it has."""
    kept = list(mask.values())
    pairs = pairwise(kept)
    return all(torch.equal(one.any(1), following.any(0)) for one, following in pairs)


def test_every_level_loses_whole_units_and_counts_what_its_mask_keeps():
    winner = searched(tree=Tree(0.2, coarse_rate=None))
    report = winner.report
    assert report.stop_reason is StopReason.EXHAUSTED
    assert (report.unit, report.units, report.counted, report.cost) == ("neuron", 22, "weights", 222)
    assert report.multiply_adds == 10 + 4 * 72 + 2 * 120 + 30
    before = 222
    for level in report.levels:
        mask = winner.mask_at(level.level)
        assert dead(mask)
        assert (level.survivors, level.sparsity) == (mask.survivors, mask.sparsity)
        assert level.units == int(UNITS.alive(mask).sum())
        assert level.multiply_adds == round(UNITS.left(mask, MULTIPLY_ADDS))
        assert level.cost == mask.survivors <= before - min(0.2 * before, before - UNITS.left(mask))
        before = mask.survivors
    assert report.levels[-1].units == 2


def test_candidates_of_a_level_may_differ_and_each_has_its_own_sparsity():
    evaluate = Likeness()
    observer = Steps(evaluate)
    given = {"tree": Tree(0.3, coarse_rate=None, max_levels=2), "branches": 12}
    winner = search(
        WEIGHTS,
        evaluate,
        wheel=replace(NEURON, sharpness=1.0),
        units=UNITS,
        observer=observer,
        tolerance=math.inf,
        **given,
    )
    candidates: list[Candidate] = list(winner.report.levels[0].candidates)
    assert len({one.sparsity for one in candidates}) > 1
    assert {one.sparsity for one in candidates} <= {mask.sparsity for mask in evaluate.log}
    best = next(one for one in candidates if one.index == winner.report.levels[0].winner)
    assert best.sparsity == winner.report.levels[0].sparsity == winner.mask_at(1).sparsity


@pytest.mark.parametrize("coarse", [None, 0.3])
def test_a_reduction_of_multiply_adds_ends_the_search_within_one_unit(coarse):
    tree = Tree(0.1, coarse_rate=coarse, target=Reduction(multiply_adds=0.5))
    calibration = Calibration(NET, list(INPUTS.split(50)))
    winner = searched(tree=tree, units=DEAR, refit="least_squares", calibration=calibration)
    report = winner.report
    assert (report.stop_reason, report.target_met) == (StopReason.TARGET_REACHED, True)
    assert (report.counted, report.target_reduction, report.cost) == ("multiply_adds", 0.5, 568)
    left = DEAR.left(winner.mask)
    dearest = float(DEAR.costs(Mask.full(WEIGHTS)).max())
    assert 284 - dearest < left <= 284
    assert report.winner.cost == left == report.winner.multiply_adds
    assert "Target 50.00% fewer multiply-adds: met." in str(report)
    assert f"{left:,.0f} of 568 multiply-adds of a sample" in str(report)
    assert SearchReport.from_dict(report.to_dict()) == report
    after = torch.func.functional_call(NET, winner.weights, (INPUTS,))
    drawn = torch.func.functional_call(
        NET, {name: WEIGHTS[name] * kept for name, kept in winner.mask.items()}, (INPUTS,)
    )
    dense = NET(INPUTS)
    assert (after - dense).square().mean() < (drawn - dense).square().mean()


@pytest.mark.parametrize("tenths", range(1, 10))
def test_a_target_that_is_met_exactly_ends_the_search_there(tenths):
    net = perceptron((6, 20, 3), seed=1)
    weights = {name: one.detach() for name, one in net.named_parameters() if name.endswith("weight")}
    adds = Cost("multiply_adds", dict.fromkeys(weights, 1.0))
    winner = search(
        weights,
        Likeness(net),
        wheel=NEURON,
        units=hidden_units(net, adds, adds),
        tree=Tree(0.2, target=Reduction(multiply_adds=tenths / 10)),
        tolerance=math.inf,
        branches=1,
    )
    assert (winner.report.stop_reason, winner.report.target_met) == (StopReason.TARGET_REACHED, True)
    assert winner.report.winner.units == 20 - 2 * tenths


def chosen(choose: bool, **changes):
    tree = Tree(0.2, coarse_rate=None, target=Reduction(multiply_adds=0.5))
    given = {"tree": tree, "units": DEAR, "refit": LeastSquares(choose=choose)}
    return searched(calibration=Calibration(NET, list(INPUTS.split(50))), **(given | changes))


def test_a_refit_that_chooses_removes_whole_units_to_the_same_target_and_loses_less():
    winners = [chosen(choose, seed=seed) for choose in (True, False) for seed in range(3)]
    for winner in winners:
        report = winner.report
        assert (report.stop_reason, report.target_met) == (StopReason.TARGET_REACHED, True)
        assert all(dead(winner.mask_at(level.level)) for level in report.levels)
        assert [level.cost for level in report.levels] == [
            DEAR.left(winner.mask_at(level.level)) for level in report.levels
        ]
    assert sum(one.report.winner.score for one in winners[:3]) > sum(one.report.winner.score for one in winners[3:])
    assert "survivors chosen and solved by least squares" in winners[0].report.refit
    again = chosen(True, seed=0)
    assert again.mask == winners[0].mask
    assert all(torch.equal(value, again.weights[name]) for name, value in winners[0].weights.items())


def test_gradient_steps_leave_removed_units_dead():
    solved, taught = (chosen(False, refit=LeastSquares(distill=steps)) for steps in (0, 40))
    assert dead(taught.mask)
    assert all(not taught.weights[name][~kept].any() for name, kept in taught.mask.items())
    assert not torch.equal(taught.weights["0.bias"], solved.weights["0.bias"])
    assert taught.report.winner.cost == solved.report.winner.cost
    assert taught.report.winner.score > solved.report.winner.score


def test_a_cut_that_chooses_revives_no_unit():
    gradual = Gradual(Cuts(1, math.inf, None, 3, refit=LeastSquares(choose=True), wheel=NEURON, tree=Tree(0.3)))
    net, masks = perceptron((6, 12, 10, 3), seed=1), []
    for place in (1, 2, 3):
        weights = {name: net.get_parameter(name).detach() for name in WEIGHTS}
        gradual.judge(weights, Likeness(net), Calibration(net, [INPUTS]), units=UNITS)
        network = gradual.cut(place)
        net.load_state_dict({**net.state_dict(), **network.weights})
        masks.append(network.mask)
    assert masks[2] <= masks[1] <= masks[0]
    assert all(dead(mask) for mask in masks)


def test_a_sparsity_is_reached_within_one_unit():
    winner = searched(target_sparsity=0.6, tree=Tree(0.25, coarse_rate=None))
    assert winner.report.target_met
    assert 0.6 * 222 <= 222 - winner.mask.survivors < 0.6 * 222 + 22


def test_pruned_rows_and_columns_may_be_removed_from_the_winner():
    """The network without the units that have left gives the same outputs."""
    winner = searched(tree=Tree(0.3, coarse_rate=None, max_levels=3))
    with torch.no_grad():
        values = dict(NET.state_dict()) | winner.weights
        expected = torch.func.functional_call(NET, values, (INPUTS,))
        rows = [winner.mask[name].any(1) for name in ("0.weight", "2.weight")]
        x = INPUTS
        for place, here, before in (("0", rows[0], slice(None)), ("2", rows[1], rows[0]), ("4", slice(None), rows[1])):
            x = x @ values[f"{place}.weight"][here][:, before].T + values[f"{place}.bias"][here]
            x = x if place == "4" else x.relu()
    torch.testing.assert_close(x, expected)


def test_importance_factors_belong_to_groups():
    wheel = replace(NEURON, allocation=3.0)
    shares = set()
    for seed in range(6):
        winner = searched(wheel=wheel, branches=1, seed=seed, tree=Tree(0.4, coarse_rate=None, max_levels=1))
        alive = UNITS.alive(winner.mask)
        shares.add((int(alive[:12].sum()), int(alive[12:].sum())))
    assert max(one for one, _ in shares) - min(one for one, _ in shares) > 3


def test_cuts_between_epochs_nest_and_follow_a_cubic_schedule():
    tree, evaluate = Tree(0.2, target=Reduction(multiply_adds=0.5)), Likeness()
    gradual = Gradual(Cuts(1, math.inf, None, 3, wheel=NEURON, tree=tree))
    weights, masks = dict(WEIGHTS), []
    for place in (1, 2, 3):
        gradual.judge(weights, evaluate, units=DEAR)
        if (network := gradual.cut(place)) is not None:  # it may have exceeded the goal of the next cut
            weights = dict(network.weights)
        masks.append(gradual.mask)
    gradual.judge(weights, evaluate)
    shares = [1 - DEAR.left(mask) / 568 for mask in masks]
    for share, place in zip(shares, (1, 2, 3), strict=True):
        goal = 0.5 * (1 - (1 - place / 3) ** 3)
        assert goal <= share < goal + 0.13
    assert masks[2] <= masks[1] <= masks[0]
    assert all(dead(mask) for mask in masks)
    report = gradual.ended()
    assert (report.stop_reason, report.target_met, report.units) == (StopReason.TARGET_REACHED, True, 22)
    assert [level.multiply_adds for level in report.levels] == list(dict.fromkeys(map(round, map(DEAR.left, masks))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": None}, "the wheel's unit is Neuron.*, but units is None. Pass units=units_of"),
        ({"wheel": Wheel()}, "the wheel's unit is Weight.*, but units is units of the kind 'neuron'"),
        ({"wheel": Wheel(), "units": None, "tree": Tree(target=Reduction(0.5))}, "but single weights leave"),
        ({"target_sparsity": 0.5, "tree": Tree(target=Reduction(0.5)), "units": DEAR}, "but a search has one target"),
        ({"tree": Tree(target=Reduction(0.5))}, "the target counts multiply_adds, but units cost weights"),
        ({"units": hidden_units(perceptron((6, 12, 10, 9, 3)))}, "units are parts of '6.weight', but weights"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_search(changes, message):
    evaluate = Likeness()
    given = {"wheel": NEURON, "units": UNITS, "calibration": Calibration(NET, [INPUTS])} | changes
    with pytest.raises(ValueError, match=message):
        search(WEIGHTS, evaluate, **given)
    assert not evaluate.log


def test_a_cut_without_its_units_is_refused():
    gradual = Gradual(Cuts(1, math.inf, None, 3, wheel=NEURON))
    gradual.judge(WEIGHTS, Likeness())
    with pytest.raises(ValueError, match="the wheel's unit is Neuron.*, but units is None"):
        gradual.cut(1)
