"""Search with a refit: which networks are judged, which wins, which weights are returned, and what is unchanged."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_roulette import (
    Calibration,
    LeastSquares,
    Observer,
    Scores,
    SearchReport,
    Singles,
    Tree,
    Validation,
    Wheel,
    search,
)
from lightning_roulette.refit_settings import Refit
from tests.support.evaluators import key_of, noise
from tests.support.networks import state_of
from tests.support.refits import (
    LEVELS,
    MIX,
    ONE_LEVEL,
    WEIGHTS,
    Asked,
    SoFar,
    by_turns,
    equal,
    faithful,
    inputs,
    masks_of,
    named,
    network,
    random,
    ranked,
    refit_of,
    weights_of,
)

STATISTICS = ("1.running_mean", "1.running_var")
LEAST_SQUARES = {*WEIGHTS, "0.bias", "3.bias", "5.bias", *STATISTICS}
END = LeastSquares(each_level=False)
NOT_FINITE = "its inputs or its solved weights are not finite"


def pruned(net, mask):
    """The dense weights, zero where the mask prunes."""
    return {name: weight.detach().masked_fill(~mask[name], 0) for name, weight in weights_of(net).items()}


@pytest.mark.parametrize(
    ("refit", "changed"), [("least_squares", LEAST_SQUARES), ("batch_norm", {*WEIGHTS, *STATISTICS})]
)
def test_the_evaluator_is_given_the_values_that_the_refit_changed(refit, changed):
    net = network()
    evaluate = faithful(net)
    winner = ranked(net, refit, evaluate)
    assert evaluate.refitted
    for candidate in evaluate.refitted:
        seen = candidate.weights
        assert candidate.refitted.keys() == seen.keys() == changed
        for name, kept in candidate.mask.items():
            assert not seen[name][~kept].any()
            assert torch.equal(seen[name][kept], candidate.refitted[name][kept])
        assert all(torch.equal(seen[name], candidate.refitted[name]) for name in seen.keys() - {*WEIGHTS})
    for level, mask in enumerate(masks_of(winner)):  # survivors change with least squares alone
        survivors = {name: winner.weights_at(level)[name] for name in WEIGHTS}
        assert equal(survivors, pruned(net, mask)) == (refit == "batch_norm" or level == 0)
    assert not torch.equal(winner.weights["1.running_mean"], net[1].running_mean)


def test_a_candidate_has_its_parents_values_until_it_is_refitted_and_then_its_own():
    net = network()
    evaluate = faithful(net)
    winner = ranked(net, LeastSquares(finalists=2), evaluate)
    dense = {key_of(winner.mask_at(0))}
    own = other = 0
    for candidate, _ in evaluate.log:
        if key_of(candidate.mask) in dense or not candidate.refitted:
            continue
        if equal(candidate.refitted, refit_of(net, candidate.mask)):
            own += 1
        else:
            parents = [winner.weights_at(level) for level in (1, 2)]
            (parent,) = (one for one in parents if equal(candidate.refitted, one))
            for name, kept in candidate.mask.items():
                assert torch.equal(candidate.weights[name], parent[name].masked_fill(~kept, 0))
            other += 1
    # two finalists and the winner on the search half, the winner on the held-out half; twice fold by fold
    assert own >= 3 * 4
    assert other >= 4
    first = [one for one, _ in evaluate.log if one.mask.survivors == winner.mask_at(1).survivors and not one.refitted]
    assert len(first) == 6
    for candidate in first:  # the parent is the dense network
        assert equal(candidate.weights, pruned(net, candidate.mask))


def test_levels_with_chosen_survivors_have_the_counts_of_the_wheel_and_are_judged_as_they_are_kept():
    net = network()
    evaluate = faithful(net)
    winner, drawn = ranked(net, LeastSquares(choose=True), evaluate), ranked(net, LeastSquares(), faithful(net))
    masks = masks_of(winner)
    assert [one.survivors for one in winner.report.levels] == [one.survivors for one in drawn.report.levels]
    assert masks != masks_of(drawn)
    judged = {key_of(candidate.mask) for candidate, _ in evaluate.log if candidate.refitted}
    for level, mask in enumerate(masks[1:], 1):
        weights = winner.weights_at(level)
        assert all(torch.equal(weights[name] != 0, kept) for name, kept in mask.items())
        assert key_of(mask) in judged


def test_the_wheel_of_the_next_level_looks_at_the_refitted_weights():
    net, seen = network(), []

    def importance(weights):
        seen.append({name: weight.clone() for name, weight in weights.items()})
        return {name: weight.abs() for name, weight in weights.items()}

    winner = ranked(net, wheel=Wheel(importance=importance, allocation=0.0))
    assert len(seen) == 3
    for level, weights in enumerate(seen):
        assert equal(weights, {name: winner.weights_at(level)[name] for name in WEIGHTS})


@pytest.mark.parametrize(
    ("kind", "finalists", "race"),
    [
        (LeastSquares, 1, False),
        (LeastSquares, 2, True),
        (LeastSquares, 4, False),
        (Refit, 4, True),
        (Refit, 6, False),
        (LeastSquares, 9, True),
    ],
)
def test_the_finalists_of_each_level_are_refitted(kind, finalists, race):
    for level in ranked(network(), kind(finalists=finalists), validation=Validation(race=race)).report.levels:
        assert len({one.index for one in level.candidates}) == 6
        refitted = [one for one in level.candidates if one.refitted]
        assert len(refitted) == min(finalists, 6)
        assert all(one.folds == 2 for one in refitted)
        assert level.winner in [one.index for one in refitted]


@pytest.mark.parametrize("finalists", [1, 3, 6])
def test_the_best_before_the_refit_are_refitted_and_the_best_after_it_wins(finalists):
    evaluate = by_turns(lambda mask: noise(mask, 0), lambda mask: noise(mask, 1))
    (level,) = ranked(network(), LeastSquares(finalists=finalists), evaluate, tree=ONE_LEVEL).report.levels
    before, after = {}, {}
    for candidate, _ in evaluate.log:
        if candidate.mask.sparsity:
            scores = after if candidate.refitted else before
            scores[key_of(candidate.mask)] = evaluate.score(candidate, ())
    assert after.keys() == {*sorted(before, key=before.get)[-finalists:]}
    assert level.score == max(after.values())
    refitted = {one.index: one.score for one in level.candidates if one.refitted}
    assert max(refitted, key=refitted.get) == level.winner
    assert [one.score for one in level.candidates if not one.refitted] == [
        score for key, score in before.items() if key not in after
    ]


def test_a_candidate_that_was_not_refitted_does_not_win_by_its_better_score():
    evaluate = by_turns(lambda mask: 1 + noise(mask, 0), lambda mask: noise(mask, 0))
    winner = ranked(network(), LeastSquares(finalists=2), evaluate, tree=ONE_LEVEL)
    (level,) = winner.report.levels
    assert next(one for one in level.candidates if one.index == level.winner).refitted
    assert level.score < 1 < min(one.score for one in level.candidates if not one.refitted)
    assert equal(winner.weights, refit_of(network(), winner.mask))


def test_copies_are_refitted_once():
    net, evaluate = network(), by_turns(lambda mask: noise(mask, 0), lambda mask: noise(mask, 1))
    # magnitude pruning without allocation draws the same six times
    winner = ranked(net, evaluate=evaluate, wheel=Wheel(math.inf, allocation=0.0), tree=ONE_LEVEL)
    (level,) = winner.report.levels
    assert [one.same_as for one in level.candidates] == [None, 0, 0, 0, 0, 0]
    # on the search half, and again as the winner
    asked = [folds for one, folds in evaluate.log if one.refitted and one.mask.sparsity]
    assert asked.count((0, 1)) == 2
    assert {one.score for one in level.candidates} == {level.score}


def test_a_refit_whose_score_is_nan_does_not_win():
    first = []

    def after(mask):
        first[:] = first or [key_of(mask)]
        return math.nan if [key_of(mask)] == first else 0.5

    evaluate = by_turns(lambda mask: 0.5, after)
    (level,) = ranked(network(), LeastSquares(finalists=2), evaluate, tree=ONE_LEVEL).report.levels
    bad, good = (one for one in level.candidates if one.refitted)
    assert math.isnan(bad.score)
    assert (level.winner, level.accepted, level.score) == (good.index, True, 0.5)


def test_no_level_is_accepted_if_the_scores_of_all_refits_are_nan():
    evaluate = by_turns(lambda mask: 0.5, lambda mask: math.nan)
    winner = ranked(network(), LeastSquares(finalists=2), evaluate)
    assert not any(level.accepted for level in winner.report.levels)
    assert equal(winner.weights, winner.weights_at(0))


@pytest.mark.parametrize(("refitted", "accepted"), [(1.0, True), (0.0, False)])
def test_the_refitted_network_must_keep_the_floor(refitted, accepted):
    # as drawn, candidates score the opposite
    evaluate = by_turns(lambda mask: 1 - refitted if mask.sparsity else 1.0, lambda mask: refitted)
    winner = ranked(network(), evaluate=evaluate, tolerance=0.5, tree=Tree(0.2, max_levels=1, patience=1))
    (level,) = winner.report.levels
    assert (level.accepted, level.score) == (accepted, refitted)
    assert (winner.report.winner is not None) == accepted


@pytest.mark.parametrize("confirm", [0.0, 0.5])
def test_a_refit_prunes_further_within_the_same_tolerance(confirm):
    options = {"tolerance": 0.1, "branches": 3, "validation": Validation(confirm=confirm)}
    options |= {"tree": Tree(smallest_rate=0.1), "batches": inputs(2, 300)}
    plain, refitted = (ranked(network(), refit, **options) for refit in (None, "least_squares"))
    assert refitted.report.sparsity > plain.report.sparsity + 0.05


def test_a_level_that_failed_leaves_its_parents_refit_in_place():
    net = network()
    score = faithful(net).score
    evaluate = Asked(lambda one, folds: -math.inf if one.mask.survivors == 164 else score(one, folds))
    winner = ranked(net, evaluate=evaluate)
    levels = winner.report.levels
    assert [(one.level, one.accepted) for one in levels] == [(1, True), (2, False), (2, True), (3, True)]
    assert sorted(winner.refits) == [0, 1, 2, 3]
    assert all(equal(winner.weights_at(level), refit_of(net, winner.mask_at(level))) for level in (1, 2, 3))


@pytest.mark.parametrize(
    ("how", "dtype", "count"),
    [
        *((LeastSquares(), dtype, count) for dtype in (torch.float32, torch.float64) for count in (1, 4)),
        (LeastSquares(damping=0.1, finalists=2), torch.float32, 4),
        (Refit(), torch.float32, 1),
        (Refit(), torch.float64, 4),
    ],
)
@pytest.mark.parametrize("each_level", [True, False])
def test_the_levels_that_are_confirmed_and_returned_are_refits_of_their_masks(how, each_level, dtype, count):
    net, batches = network().to(dtype), [x.to(dtype) for x in inputs(count)]
    evaluate = faithful(net)
    winner = ranked(net, replace(how, each_level=each_level), evaluate, batches)
    confirmed = [one for one, folds in evaluate.log if folds == (2, 3) and one.mask.sparsity]
    assert winner.history.deepest == 3
    assert [one.mask for one in confirmed] == masks_of(winner)[1:]
    for level, candidate in enumerate(confirmed, start=1):
        assert equal(candidate.refitted, refit_of(net, candidate.mask, how, batches))
        assert equal(candidate.weights, winner.weights_at(level))
        assert winner.report.levels[level - 1].held_out_score == evaluate.score(candidate, (2, 3))


def test_weights_of_a_winner_are_new_and_those_of_its_level():
    net = network()
    winner = ranked(net)
    dense = {name: named(net)[name].detach().clone() for name in LEAST_SQUARES}
    assert equal(winner.weights, winner.weights_at(winner.report.winner.level))
    assert equal(winner.weights_at(0), dense)
    winner.weights["0.weight"].zero_()
    winner.weights_at(3)["0.bias"].zero_()
    winner.weights_at(0)["1.running_mean"].zero_()
    assert equal(winner.weights, refit_of(net, winner.mask))
    assert equal(winner.weights_at(0), dense)
    with pytest.raises(ValueError, match=r"level is 4, but must lie between 0 \(dense\) and 3"):
        winner.weights_at(4)
    there, before = winner.cpu(), [winner.weights_at(level) for level in range(4)]
    with torch.no_grad():
        for tensor in named(net).values():
            tensor.zero_()
    assert all(equal(there.weights_at(level), before[level]) for level in range(4))


def test_a_module_that_loads_the_weights_computes_the_outputs_that_were_judged():
    net = network()
    evaluate = faithful(net)
    winner = ranked(net, evaluate=evaluate)
    loaded = network()
    assert not loaded.load_state_dict(winner.weights, strict=False).unexpected_keys
    seen = [candidate for candidate in evaluate.refitted if candidate.mask == winner.mask]
    x = inputs()[0]
    with torch.no_grad():
        assert torch.equal(loaded(x), functional_call(network(), seen[-1].weights, x))


def test_where_no_level_holds_the_winner_is_dense_and_the_refitted_levels_are_kept():
    net = network()
    score = faithful(net).score
    # the folds 2 and 3 are held out
    evaluate = Asked(lambda one, folds: -9.0 if one.mask.sparsity and min(folds) >= 2 else score(one, folds))
    winner = ranked(net, evaluate=evaluate, tolerance=5.0)
    assert winner.report.winner is None
    assert (winner.history.level, winner.history.deepest) == (0, 3)
    assert equal(winner.weights, {name: named(net)[name].detach() for name in LEAST_SQUARES})
    assert equal(winner.weights_at(2), refit_of(net, winner.mask_at(2)))


def test_an_observer_is_given_the_refitted_weights():
    net = network()
    evaluate = faithful(net)
    observer = SoFar(evaluate)
    ranked(net, evaluate=evaluate, observer=observer)
    assert [so_far.history.level for so_far in observer.so_far] == [1, 2, 3]
    assert all(equal(so_far.weights, refit_of(net, so_far.mask)) for so_far in observer.so_far)


def test_refitted_networks_are_certified():
    class Certifying(Asked):
        """Whether each of 3000 samples has the class that the dense network gives to most."""

        def __init__(self, net):
            super().__init__(lambda *_: 0, folds=4)
            self.net, self.data = copy.deepcopy(net), random(4, 750, 8, seed=60) @ MIX
            with torch.no_grad():
                self.classes = (
                    (net(self.data.flatten(0, 1)) + 0.5 * random(3000, 4, seed=61)).argmax(1).unflatten(0, (4, 750))
                )

        @torch.no_grad()
        def recorded(self, candidate, folds):
            x = self.data[list(folds)].flatten(0, 1)
            right = self.classes[list(folds)].flatten() == functional_call(self.net, candidate.weights, x).argmax(1)
            value = float(right.double().mean())
            return Scores(value, value), Singles(right.double(), 0.0, 1.0)

        def __call__(self, candidate, folds):
            return self.recorded(candidate, folds)[0]

    net, options = network(), {"tolerance": 0.1, "confidence": 0.9, "branches": 3}
    options |= {"tree": Tree(smallest_rate=0.1), "batches": inputs(2, 300)}
    plain, refitted = (ranked(net, refit, Certifying(net), **options) for refit in (None, "least_squares"))
    assert refitted.report.sparsity > plain.report.sparsity
    assert refitted.report.winner.p_value <= 0.1
    assert "With confidence 0.9" in str(refitted.report)


@pytest.mark.parametrize("kind", [Refit, LeastSquares])
def test_a_refit_at_the_end_does_not_change_the_search(kind):
    net = network()
    evaluate, plain = faithful(net), faithful(net)
    observer = SoFar(evaluate)
    refitted, without = ranked(net, kind(each_level=False), evaluate, observer=observer), ranked(net, None, plain)
    known = len(evaluate.log) - len(plain.log)  # the calibration data is judged by the statistics of the dense network
    assert known == 1 + 2  # on the search half, then fold by fold
    assert not any(candidate.refitted and candidate.mask.sparsity for candidate, _ in evaluate.log[: observer.at])
    assert masks_of(refitted) == masks_of(without)
    for one, other in zip(refitted.report.levels, without.report.levels, strict=True):
        assert (one.candidates, one.score) == (other.candidates, other.score)
        assert not any(candidate.refitted for candidate in one.candidates)


def assert_merely_pruned(net, winner, level) -> None:
    mask, found = winner.mask_at(level), winner.weights_at(level)
    assert equal({name: found[name] for name in WEIGHTS}, pruned(net, mask))
    assert all(torch.equal(found[name], named(net)[name]) for name in found.keys() - {*WEIGHTS})


def test_without_held_out_data_the_winner_alone_is_refitted_at_the_end():
    net = network()
    evaluate = faithful(net)
    winner = ranked(net, END, evaluate, validation=Validation(confirm=0))
    assert sorted(winner.refits) == [0, 3]
    assert equal(winner.weights, refit_of(net, winner.mask))
    assert evaluate.refitted
    assert all(candidate.mask == winner.mask for candidate in evaluate.refitted)
    for level in (1, 2):  # the others are what they were judged as
        assert_merely_pruned(net, winner, level)


@pytest.mark.parametrize("after", [1.0, 0.5, math.nan])
def test_without_held_out_data_a_refit_at_the_end_that_gains_nothing_is_not_taken(after):
    net = network()
    evaluate = by_turns(lambda mask: 1.0, lambda mask: after)
    winner = ranked(net, END, evaluate, validation=Validation(confirm=0))
    assert winner.report.winner.level == 3
    assert sorted(winner.refits) == [0]
    assert_merely_pruned(net, winner, 3)


def test_a_search_that_accepts_nothing_refits_nothing_at_the_end():
    winner = ranked(network(), END, Asked(lambda candidate, _: candidate.mask.sparsity == 0), tolerance=0.5)
    assert sorted(winner.refits) == [0]
    assert equal(winner.weights, winner.weights_at(0))


@pytest.mark.parametrize("race", [False, True])
def test_without_a_refit_a_calibration_changes_nothing(race):
    net = network()
    options = {"branches": 6, "tolerance": math.inf, "tree": LEVELS, "validation": Validation(race=race)}
    options["wheel"] = Wheel(8.0)
    one, two = faithful(net), faithful(net)
    plain, given = search(weights_of(net), one, **options), ranked(net, None, two, **options)
    assert masks_of(plain) == masks_of(given)
    assert plain.report.levels == given.report.levels
    assert [(key_of(asked.mask), folds) for asked, folds in one.log] == [
        (key_of(asked.mask), folds) for asked, folds in two.log
    ]
    assert not one.refitted
    assert given.refits == {}
    assert (given.report.refit, given.report.left_alone) == ("", {})
    assert "efit" not in str(given.report)
    assert equal(given.weights_at(0), {name: one.detach() for name, one in weights_of(net).items()})


@pytest.mark.parametrize("importance", ["magnitude", "activation", "obs"])
def test_the_same_seed_gives_the_same_winner(importance):
    wheel = Wheel(importance=importance)
    one, two, other = (ranked(network(), wheel=wheel, seed=seed) for seed in (5, 5, 6))
    assert masks_of(one) == masks_of(two)
    assert all(equal(one.weights_at(level), two.weights_at(level)) for level in range(4))
    assert one.report.levels == two.report.levels
    assert one.mask != other.mask


class Failing(nn.Sequential):
    """Raises in one of its forward passes."""

    calls, fails_at, error = 0, 0, None

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.error("enough")
        return super().forward(x)


@pytest.mark.parametrize("each_level", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_bit_for_bit_as_before(each_level, training):
    net = network().train(training)
    before = state_of(net)
    ranked(net, LeastSquares(each_level=each_level), wheel=Wheel(importance="obs"))
    assert state_of(net) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("who", "when"), [*(("evaluator", when) for when in (1, 8, 12, 30)), *(("network", when) for when in (1, 3, 8, 20))]
)
def test_the_network_is_bit_for_bit_as_before_when_something_fails(who, when, error):
    net = Failing(*network()).train()
    inner = faithful(network())

    def score(candidate, folds):
        if who == "evaluator" and len(inner.log) == when:
            raise error("enough")
        return inner(candidate, folds).score

    if who == "network":
        net.fails_at, net.error = when, error
    before = state_of(net)
    with pytest.raises(error, match="enough"):
        ranked(net, evaluate=Asked(score))
    assert state_of(net) == before


NO_INPUTS = "but calibration is None. Pass calibration=Calibration"
NO_REFIT = "but must be one of 'batch_norm', 'least_squares'"
NO_KIND = "must be None, one of batch_norm, least_squares, or a LeastSqu"
NOT_SEEN = "does not see refitted values. Pass an Evaluator"
REFITS = ("least_squares", "batch_norm", LeastSquares(), Refit(each_level=False))
WRONG = (True, False, 0, 1, LeastSquares, ["least_squares"], nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *(({"refit": one, "calibration": None}, ValueError, f"refit is .*{NO_INPUTS}") for one in REFITS),
        *(
            ({"wheel": Wheel(importance=word), "calibration": None}, ValueError, f"importance is '{word}', {NO_INPUTS}")
            for word in ("activation", "obs")
        ),
        *(({"refit": word}, ValueError, f"refit is '{word}', {NO_REFIT}") for word in ("", "obs", "LEAST_SQUARES")),
        *(({"refit": wrong}, TypeError, f"refit is .*{NO_KIND}") for wrong in WRONG),
        ({"refit": "batch_norm", "evaluate": lambda mask: 1.0}, ValueError, NOT_SEEN),
    ],
)
def test_a_refit_that_is_not_possible_is_refused(options, error, message):
    net = network()
    usual = {"evaluate": Asked(lambda *_: 1.0), "calibration": Calibration(net, inputs())}
    with pytest.raises(error, match=message):
        search(weights_of(net), **usual | options)


@pytest.mark.parametrize(
    ("refit", "words"),
    [
        ("least_squares", "survivors by least squares, and running statistics, of the best candidate of a level"),
        ("batch_norm", "running statistics, of the best candidate of a level"),
        (END, "survivors by least squares, and running statistics, at the end"),
        (Refit(each_level=False), "running statistics, at the end"),
        (
            LeastSquares(choose=True),
            "survivors chosen and solved by least squares, and running statistics, of the best",
        ),
        (
            LeastSquares(distill=3),
            "survivors by least squares and 3 gradient steps, and running statistics, of the best",
        ),
        (LeastSquares(finalists=2), "survivors by least squares, and running statistics, of the best 2 candidates of"),
        (None, ""),
    ],
)
def test_the_report_names_the_refit_and_survives_json(refit, words):
    report = ranked(network(), refit).report
    assert report.refit.startswith(words)
    for text in (str(report), report.markdown()):
        assert "Refit: " not in text  # nothing is unusual
        assert "Not refitted" not in text
    assert report.left_alone == {}
    read = read_back(report)
    assert (repr(read), str(read)) == (repr(report), str(report))


def read_back(report: SearchReport) -> SearchReport:
    return SearchReport.from_dict(json.loads(json.dumps(report.to_dict())))


class Partly(nn.Module):
    """Two layers that can be refitted, one parameter of no layer, one layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 12), nn.Linear(12, 4), nn.Linear(3, 3)
        self.free = nn.Parameter(random(4, 4, seed=5))

    def forward(self, x):
        return self.second(self.first(x).relu()) @ self.free


@pytest.mark.parametrize("each_level", [True, False])
def test_the_report_names_the_weights_that_cannot_be_refitted(each_level):
    torch.manual_seed(0)
    net = Partly()
    weights = {name: one for name, one in net.named_parameters() if one.dim() > 1}
    calibration, how = Calibration(net, inputs()), LeastSquares(each_level=each_level)
    options = {"branches": 3, "tolerance": math.inf, "tree": LEVELS, "refit": how, "calibration": calibration}
    winner = search(weights, Asked(lambda *_: 1.0, 1), **options)
    report = winner.report
    assert report.left_alone == calibration.left_alone(winner.mask_at(0), how)
    assert report.left_alone.keys() == {"free", "unused.weight"}
    assert "not supported for free" in report.left_alone["free"]
    assert "does not call it" in report.left_alone["unused.weight"]
    assert "Not refitted: 9.5% of the prunable weights, in free (not supported for free of Partly)." in str(report)
    assert [(one.names, one.weights) for one in report.not_refitted] == [(("free",), 16), (("unused.weight",), 9)]
    for name in report.left_alone:
        assert torch.equal(winner.weights[name], weights[name] * winner.mask[name])
    assert read_back(report).left_alone == report.left_alone
    assert read_back(report).not_refitted == report.not_refitted
    assert str(read_back(report)) == str(report)


@pytest.mark.parametrize("each_level", [True, False])
def test_the_report_names_the_weights_whose_refit_was_not_kept(each_level):
    # float16 holds no number beyond 65504, and the survivor would have to be 480000.5
    net, x = nn.Linear(2, 1, bias=False).half(), torch.rand(64, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, 60000.0]]))
    winner = search(
        {"weight": net.weight},
        Asked(lambda one, _: float(bool(one.mask["weight"][0, 0]))),
        refit=LeastSquares(damping=0.0, each_level=each_level),
        calibration=Calibration(net, [torch.cat([x, 8 * x], 1).half()]),
        branches=8,
        tolerance=math.inf,
        wheel=Wheel(0.0),
        tree=Tree(0.5, max_levels=1),
    )
    (level,) = winner.report.levels
    assert winner.weights["weight"].tolist() == [[0.5, 0.0]]
    assert level.undone == read_back(winner.report).levels[0].undone == {"weight": NOT_FINITE}
    assert f"Refit not kept for weight: {NOT_FINITE}." in str(winner.report)
    assert str(read_back(winner.report)) == str(winner.report)


class Times(Observer):
    """Collects how long levels took, and how long their refits did by a clock of its own."""

    def __init__(self, monkeypatch):
        self.told, self.refits, original = [], [0.0], Calibration.refit

        def timed(*arguments, **choices):
            began = time.monotonic()
            found = original(*arguments, **choices)
            self.refits[-1] += time.monotonic() - began
            return found

        monkeypatch.setattr(Calibration, "refit", timed)

    def on_timed(self, level, so_far, time):
        assert so_far.report.levels[-1] is level
        self.told.append(time)
        self.refits.append(0.0)


@pytest.mark.parametrize("refit", [None, "least_squares", LeastSquares(finalists=2), LeastSquares(each_level=False)])
def test_an_observer_is_told_how_long_a_level_and_its_refit_took(refit, monkeypatch):
    times, began = Times(monkeypatch), time.monotonic()
    ranked(network(), refit, observer=times)
    assert len(times.told) == 3
    assert sum(one.seconds for one in times.told) <= time.monotonic() - began
    for told, ours in zip(times.told, times.refits, strict=False):
        assert told.seconds >= told.refit
        refitted = refit not in (None, LeastSquares(each_level=False))
        assert told.refit == pytest.approx(ours if refitted else 0, rel=0.75)  # another process may run in between
        assert (told.refit > 0) == refitted
