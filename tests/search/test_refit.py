"""Search with a refit: what the evaluator is asked about, what wins, what is returned, and what stays as it was."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_roulette import (
    Calibration,
    LeastSquares,
    Level,
    Mask,
    Observer,
    PrunedWeights,
    Scores,
    SearchReport,
    Singles,
    Tree,
    Validation,
    Wheel,
    Winner,
    search,
)
from lightning_roulette.settings import Refit
from lightning_roulette.wheel.chance import normal, stream, uniforms
from tests.support.evaluators import key_of, noise

WEIGHTS = ("0.weight", "3.weight", "5.weight")
BIASES = ("0.bias", "3.bias", "5.bias")
STATISTICS = ("1.running_mean", "1.running_var")
LEAST_SQUARES = {*WEIGHTS, *BIASES, *STATISTICS}
LEVELS = Tree(0.2, max_levels=3)
MAGNITUDE = Wheel(math.inf)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# correlated inputs: else there is little that survivors can make up for
MIX = random(8, 8, seed=30) + torch.eye(8)


def network() -> nn.Sequential:
    """8 * 12 + 12 * 10 + 10 * 4 = 256 prunable weights; running statistics as if it had been trained."""
    net = nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)
    ).eval()
    with torch.no_grad():
        for place, tensor in enumerate(net.parameters()):
            tensor.copy_(random(*tensor.shape, seed=place) * 0.5)
        seen = net[0](random(2000, 8, seed=22) @ MIX)
        net[1].running_mean.copy_(seen.mean(0))
        net[1].running_var.copy_(seen.var(0))
    return net


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: dict(net.named_parameters())[name] for name in WEIGHTS}


def inputs(count: int = 4, size: int = 32) -> list[Tensor]:
    return [random(size, 8, seed=40 + place) @ MIX for place in range(count)]


def named(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def content(net: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in named(net).items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].detach().numpy().tobytes() == other[name].detach().numpy().tobytes()
        for name in one
    )


class Asked:
    """An evaluator of a few folds by a function of the candidate and the folds; keeps all that it is asked about."""

    def __init__(self, score: Callable[[PrunedWeights, tuple[int, ...]], float], folds: int = 4) -> None:
        self.score, self.folds, self.log = score, folds, []

    def __call__(self, candidate, folds):
        self.log.append((candidate, tuple(folds)))
        value = float(self.score(candidate, tuple(folds)))
        return Scores(rank=value, score=value)

    @property
    def refitted(self) -> list[PrunedWeights]:
        return [candidate for candidate, _ in self.log if candidate.refitted]


def faithful(net: nn.Module, folds: int = 4) -> Asked:
    """Scores how close a network's outputs are to the dense one's."""
    dense = copy.deepcopy(net)
    data = (random(folds, 16, 8, seed=50) @ MIX).to(next(net.parameters()).dtype)
    with torch.no_grad():
        wanted = dense(data.flatten(0, 1)).unflatten(0, (folds, 16))

    @torch.no_grad()
    def score(candidate, asked):
        found = functional_call(dense, candidate.weights, data[list(asked)].flatten(0, 1))
        return -float((found - wanted[list(asked)].flatten(0, 1)).square().mean())

    return Asked(score, folds)


def ranked(net: nn.Module, refit="least_squares", evaluate=None, batches=None, **options) -> Winner:
    """A search of three levels that accepts anything."""
    defaults = {"branches": 6, "tolerance": math.inf, "tree": LEVELS, "validation": Validation(race=False)}
    defaults["wheel"] = Wheel(8.0)  # so that candidates of networks as small as these differ
    calibration = Calibration(net, inputs() if batches is None else batches)
    evaluate = evaluate or faithful(net)
    return search(weights_of(net), evaluate, refit=refit, calibration=calibration, **defaults | options)


def anew(net: nn.Module, mask: Mask, how: Refit | None = None, batches=None) -> dict[str, Tensor]:
    """What a refit of a mask gives, asked of a calibration of its own."""
    return dict(Calibration(net, inputs() if batches is None else batches).refit(mask, how or LeastSquares()).values)


# ------------------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize(("refit", "changed"), [("least_squares", LEAST_SQUARES), ("batch_norm", None)])
def test_the_evaluator_is_given_what_the_refit_changed(refit, changed):
    net = network()
    evaluate = faithful(net)
    ranked(net, refit, evaluate)
    assert evaluate.refitted
    for candidate in evaluate.refitted:
        assert candidate.refitted.keys() == (changed or {*WEIGHTS, *STATISTICS})
        seen = candidate.weights
        assert seen.keys() == {*WEIGHTS} | candidate.refitted.keys()
        for name, kept in candidate.mask.items():
            assert not seen[name][~kept].any()
            assert torch.equal(seen[name][kept], candidate.refitted[name][kept])
        assert all(torch.equal(seen[name], candidate.refitted[name]) for name in seen.keys() - {*WEIGHTS})


def test_a_mere_refit_of_running_statistics_leaves_the_survivors_as_they_were():
    net = network()
    winner = ranked(net, "batch_norm")
    for level in range(4):
        found, mask = winner.weights_at(level), winner.mask_at(level)
        assert all(torch.equal(found[name], weights_of(net)[name] * mask[name]) for name in WEIGHTS)
    assert not torch.equal(winner.weights["1.running_mean"], net[1].running_mean)


def test_running_statistics_are_those_of_the_pruned_network():
    net = network()
    calibration = Calibration(net, inputs())
    for share in (0.3, 0.6):
        mask = Mask({name: random(*weight.shape, seed=70).abs() > share for name, weight in weights_of(net).items()})
        found = calibration.refit(mask, Refit()).values
        with torch.no_grad():
            seen = nn.functional.linear(torch.cat(inputs()), net[0].weight * mask["0.weight"], net[0].bias)
        assert torch.allclose(found["1.running_mean"], seen.mean(0), atol=1e-6)
        assert torch.allclose(found["1.running_var"], seen.var(0), rtol=1e-5)


def test_running_statistics_of_the_inputs_are_those_of_the_inputs():
    net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
    mask = Mask({"1.weight": random(4, 8, seed=1) > 0})
    calibration = Calibration(net, inputs())
    for _ in range(2):
        found = calibration.refit(mask, LeastSquares()).values
        assert torch.allclose(found["0.running_mean"], torch.cat(inputs()).mean(0), atol=1e-6)


def test_what_the_evaluator_is_given_of_a_candidate_is_its_own_refit():
    net = network()
    evaluate = faithful(net)
    winner = ranked(net, LeastSquares(finalists=2), evaluate)
    dense = {key_of(winner.mask_at(0))}
    own = other = 0
    for candidate, _ in evaluate.log:
        if key_of(candidate.mask) in dense or not candidate.refitted:
            continue
        if equal(candidate.refitted, anew(net, candidate.mask)):
            own += 1
        else:  # a candidate before its refit, over its parent's values
            parents = [winner.weights_at(level) for level in (1, 2)]
            assert any(equal(candidate.refitted, parent) for parent in parents)
            other += 1
    # two finalists and the winner on the ranking folds, the winner on the confirmation folds; twice fold by fold
    assert own >= 3 * 4
    assert other > 0


def test_candidates_of_the_first_level_are_the_dense_network_pruned_until_they_are_refitted():
    net = network()
    evaluate = faithful(net)
    ranked(net, LeastSquares(finalists=1), evaluate, tree=Tree(0.2, max_levels=1))
    before = [one for one, _ in evaluate.log if one.mask.sparsity and not one.refitted]
    assert len(before) == 6
    for candidate in before:
        assert candidate.weights.keys() == {*WEIGHTS}
        assert all(
            torch.equal(candidate.weights[name], net.get_parameter(name) * candidate.mask[name]) for name in WEIGHTS
        )


def test_candidates_of_the_next_level_have_their_parents_refitted_values():
    net = network()
    evaluate = faithful(net)
    winner = ranked(net, LeastSquares(finalists=1), evaluate, tree=Tree(0.2, max_levels=2))
    parent, keys = winner.weights_at(1), {key_of(winner.mask_at(1)), key_of(winner.mask_at(2))}
    children = [one for one, _ in evaluate.log if one.mask <= winner.mask_at(1) and key_of(one.mask) not in keys]
    assert len(children) >= 4
    for child in children:
        assert equal(child.refitted, parent)
        for name, kept in child.mask.items():
            assert torch.equal(child.weights[name], parent[name].masked_fill(~kept, 0))


def test_the_wheel_of_the_next_level_looks_at_the_refitted_weights():
    net, seen = network(), []

    def importance(weights):
        seen.append({name: weight.clone() for name, weight in weights.items()})
        return {name: weight.abs() for name, weight in weights.items()}

    winner = ranked(net, wheel=Wheel(importance=importance, allocation=0.0))
    assert len(seen) == 3
    for level, weights in enumerate(seen):
        assert equal(weights, {name: winner.weights_at(level)[name] for name in WEIGHTS})


# ------------------------------------------------------------------------------------------------ finalists


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
def test_so_many_finalists_of_each_level_are_refitted(kind, finalists, race):
    winner = ranked(network(), kind(finalists=finalists), validation=Validation(race=race), wheel=Wheel(8.0))
    for level in winner.report.levels:
        assert len({one.index for one in level.candidates}) == 6
        refitted = [one for one in level.candidates if one.refitted]
        assert len(refitted) == min(finalists, 6)
        assert all(one.folds == 2 for one in refitted)
        assert level.winner in [one.index for one in refitted]


def by_turns(before: Callable[[Mask], float], after: Callable[[Mask], float]) -> Asked:
    """Scores by one function until a candidate is refitted, then by another; for one level."""
    return Asked(lambda candidate, _: after(candidate.mask) if candidate.refitted else before(candidate.mask))


@pytest.mark.parametrize("finalists", [1, 3, 6])
def test_the_best_before_the_refit_are_refitted_and_the_best_after_it_wins(finalists):
    evaluate = by_turns(lambda mask: noise(mask, 0), lambda mask: noise(mask, 1))
    (level,) = ranked(
        network(), LeastSquares(finalists=finalists), evaluate, tree=Tree(0.2, max_levels=1)
    ).report.levels
    before, after = {}, {}
    for candidate, _ in evaluate.log:
        if candidate.mask.sparsity:
            scores = after if candidate.refitted else before
            scores[key_of(candidate.mask)] = evaluate.score(candidate, ())
    best = sorted(before, key=before.get)[-finalists:]
    assert after.keys() == {*best}
    assert level.score == max(after.values())
    refitted = {one.index: one.score for one in level.candidates if one.refitted}
    assert max(refitted, key=refitted.get) == level.winner
    assert [one.score for one in level.candidates if not one.refitted] == [
        score for key, score in before.items() if key not in after
    ]


def test_a_candidate_that_was_not_refitted_does_not_win_by_its_better_score():
    # all that were refitted are far worse than those that were not
    evaluate = by_turns(lambda mask: 1 + noise(mask, 0), lambda mask: noise(mask, 0))
    winner = ranked(network(), LeastSquares(finalists=2), evaluate, tree=Tree(0.2, max_levels=1))
    (level,) = winner.report.levels
    chosen = next(one for one in level.candidates if one.index == level.winner)
    assert chosen.refitted
    assert level.score < 1 < min(one.score for one in level.candidates if not one.refitted)
    assert equal(winner.weights, anew(network(), winner.mask))


def test_twins_are_refitted_once():
    net, evaluate = network(), by_turns(lambda mask: noise(mask, 0), lambda mask: noise(mask, 1))
    # magnitude pruning without allocation draws the same six times
    winner = ranked(net, evaluate=evaluate, wheel=Wheel(math.inf, allocation=0.0), tree=Tree(0.2, max_levels=1))
    (level,) = winner.report.levels
    assert [one.same_as for one in level.candidates] == [None, 0, 0, 0, 0, 0]
    # on the ranking folds, again as the winner, and fold by fold; the same on the confirmation folds
    asked = [folds for one, folds in evaluate.log if one.refitted and one.mask.sparsity]
    assert asked.count((0, 1)) == 2
    assert {one.score for one in level.candidates} == {level.score}


def test_a_refit_whose_score_is_no_number_does_not_win():
    first = []

    def after(mask):
        first[:] = first or [key_of(mask)]
        return math.nan if [key_of(mask)] == first else 0.5

    evaluate = by_turns(lambda mask: 0.5, after)
    (level,) = ranked(network(), LeastSquares(finalists=2), evaluate, tree=Tree(0.2, max_levels=1)).report.levels
    bad, good = (one for one in level.candidates if one.refitted)
    assert math.isnan(bad.score)
    assert (level.winner, level.accepted, level.score) == (good.index, True, 0.5)


def test_no_level_is_accepted_if_no_refit_gives_a_number():
    evaluate = by_turns(lambda mask: 0.5, lambda mask: math.nan)
    winner = ranked(network(), LeastSquares(finalists=2), evaluate)
    assert winner.report.winner is None
    assert not any(level.accepted for level in winner.report.levels)
    assert equal(winner.weights, winner.weights_at(0))


# ------------------------------------------------------------------------------------------------ the floor


def test_the_floor_is_held_against_the_refitted_network():
    # nothing would be accepted as it was drawn, everything is as refitted; and the other way round
    for refitted, accepted in ((1.0, True), (0.0, False)):
        evaluate = Asked(
            lambda one, _, refitted=refitted: (refitted if one.refitted else 1 - refitted) if one.mask.sparsity else 1.0
        )
        winner = ranked(network(), evaluate=evaluate, tolerance=0.5, tree=Tree(0.2, max_levels=1, patience=1))
        (level,) = winner.report.levels
        assert (level.accepted, level.score) == (accepted, refitted)
        assert (winner.report.winner is not None) == accepted


@pytest.mark.parametrize("confirm", [0.0, 0.5])
def test_a_refit_prunes_further_within_the_same_tolerance(confirm):
    net, options = network(), {"tolerance": 0.1, "branches": 3, "validation": Validation(confirm=confirm)}
    options["tree"] = Tree(smallest_rate=0.1)
    options["batches"] = inputs(2, 300)
    plain, refitted = ranked(net, None, **options), ranked(net, **options)
    assert refitted.report.sparsity > plain.report.sparsity + 0.05


def test_a_level_that_failed_leaves_its_parents_refit_in_place():
    net, evaluate = network(), None
    score = faithful(net).score
    evaluate = Asked(lambda one, folds: -math.inf if one.mask.survivors == 164 else score(one, folds))
    winner = ranked(net, evaluate=evaluate, tree=Tree(0.2, max_levels=3))
    levels = winner.report.levels
    assert [(one.level, one.accepted) for one in levels] == [(1, True), (2, False), (2, True), (3, True)]
    assert sorted(winner.refits) == [0, 1, 2, 3]
    for level in (1, 2, 3):
        assert equal(winner.weights_at(level), anew(net, winner.mask_at(level)))


# ------------------------------------------------------------------------------------------------ what is returned


@pytest.mark.parametrize(
    ("how", "dtype", "count"),
    [
        (LeastSquares(), torch.float32, 1),
        (LeastSquares(), torch.float32, 4),
        (LeastSquares(), torch.float64, 1),
        (LeastSquares(), torch.float64, 4),
        (LeastSquares(damping=0.1, finalists=2), torch.float32, 4),
        (Refit(), torch.float32, 1),
        (Refit(), torch.float64, 4),
    ],
)
@pytest.mark.parametrize("each_level", [True, False])
def test_the_weights_of_every_level_are_the_refit_of_its_mask(how, each_level, dtype, count):
    net, batches = network().to(dtype), [x.to(dtype) for x in inputs(count)]
    refit = replace(how, each_level=each_level)
    winner = ranked(net, refit, batches=batches)
    assert winner.history.deepest == 3
    for level in (1, 2, 3):
        found = winner.weights_at(level)
        again = anew(net, winner.mask_at(level), how, batches)
        assert found.keys() == again.keys()
        assert equal(found, again), level


def test_a_refit_does_not_depend_on_what_was_refitted_before():
    """Of a network of float64 even the order of a sum is seen."""
    net, batches = network().double(), [x.double() for x in inputs(5)]
    mask = ranked(net, batches=batches).mask
    calibration = Calibration(net, batches)
    first, second = (dict(calibration.refit(mask, LeastSquares()).values) for _ in range(2))
    assert equal(first, second)


def test_level_0_is_the_dense_network_with_its_own_biases_and_statistics():
    net = network()
    winner = ranked(net)
    found = winner.weights_at(0)
    assert found.keys() == LEAST_SQUARES
    assert equal(found, {name: named(net)[name].detach() for name in found})
    assert equal(ranked(net, None).weights_at(0), {name: one.detach() for name, one in weights_of(net).items()})


def test_the_weights_of_a_winner_are_those_of_its_level_and_new():
    net = network()
    winner = ranked(net)
    level = winner.report.winner.level
    assert equal(winner.weights, winner.weights_at(level))
    winner.weights["0.weight"].zero_()
    winner.weights_at(level)["0.bias"].zero_()
    winner.weights_at(0)["1.running_mean"].zero_()
    assert equal(winner.weights, anew(net, winner.mask))
    assert torch.equal(winner.weights_at(0)["1.running_mean"], net[1].running_mean)
    with pytest.raises(ValueError, match=r"level is 4, but must lie between 0 \(dense\) and 3"):
        winner.weights_at(4)


def test_a_winner_on_the_cpu_is_the_same_and_shares_nothing_with_the_network():
    net = network()
    winner = ranked(net)
    there, before = winner.cpu(), {level: winner.weights_at(level) for level in range(4)}
    with torch.no_grad():
        for tensor in named(net).values():
            tensor.zero_()
    assert all(equal(there.weights_at(level), before[level]) for level in range(4))


def test_a_module_that_loads_the_weights_scores_what_the_search_saw():
    net = network()
    evaluate = faithful(net)
    winner = ranked(net, evaluate=evaluate)
    loaded = network()
    keys = loaded.load_state_dict(winner.weights, strict=False)
    assert not keys.unexpected_keys
    seen = [candidate for candidate, _ in evaluate.log if candidate.mask == winner.mask and candidate.refitted]
    x = inputs()[0]
    with torch.no_grad():
        assert torch.equal(loaded(x), functional_call(network(), seen[-1].weights, x))


def test_where_no_level_holds_the_winner_is_dense_and_the_refitted_levels_can_be_had():
    net = network()
    score = faithful(net).score
    # the folds 2 and 3 confirm
    evaluate = Asked(lambda one, folds: -9.0 if one.mask.sparsity and min(folds) >= 2 else score(one, folds))
    winner = ranked(net, evaluate=evaluate, tolerance=5.0)
    assert winner.report.winner is None
    assert (winner.history.level, winner.history.deepest) == (0, 3)
    assert equal(winner.weights, {name: named(net)[name].detach() for name in LEAST_SQUARES})
    assert equal(winner.weights_at(2), anew(net, winner.mask_at(2)))


# ------------------------------------------------------------------------------------------------ confirmation


@pytest.mark.parametrize("each_level", [True, False])
@pytest.mark.parametrize("kind", [Refit, LeastSquares])
def test_what_is_confirmed_is_what_is_returned(kind, each_level):
    net = network()
    evaluate = faithful(net)
    how = kind(each_level=each_level)
    winner = ranked(net, how, evaluate)
    confirmed = [one for one, folds in evaluate.log if folds == (2, 3) and one.mask.sparsity]
    assert [one.mask for one in confirmed] == [winner.mask_at(level) for level in (1, 2, 3)]
    for level, candidate in enumerate(confirmed, start=1):
        assert equal(candidate.refitted, anew(net, winner.mask_at(level), how))
        assert equal(candidate.weights, winner.weights_at(level))
        assert winner.report.levels[level - 1].held_out_score == evaluate.score(candidate, (2, 3))


def test_refitted_networks_are_certified():
    class Certifying(Asked):
        """Whether each output has the dense one's sign, of 3000 samples."""

        def __init__(self, net):
            super().__init__(lambda *_: 0, folds=4)
            self.net, self.data = copy.deepcopy(net), random(4, 750, 8, seed=60) @ MIX

        @torch.no_grad()
        def recorded(self, candidate, folds):
            x = self.data[list(folds)].flatten(0, 1)
            right = self.net(x).argmax(1) == functional_call(self.net, candidate.weights, x).argmax(1)
            self.log.append((candidate, tuple(folds)))
            value = float(right.double().mean())
            return Scores(value, value), Singles(right.double(), 0.0, 1.0)

        def __call__(self, candidate, folds):
            return self.recorded(candidate, folds)[0]

    net = network()
    options = {
        "tolerance": 0.1,
        "confidence": 0.9,
        "branches": 3,
        "tree": Tree(smallest_rate=0.1),
        "batches": inputs(2, 300),
    }
    plain, refitted = (ranked(net, refit, Certifying(net), **options) for refit in (None, "least_squares"))
    assert refitted.report.sparsity > plain.report.sparsity
    assert refitted.report.winner.p_value <= 0.1
    assert "With confidence 0.9" in str(refitted.report)


# ------------------------------------------------------------------------------------------------ only at the end


class Grown(Observer):
    """How long the evaluator's log was when the last level was judged."""

    def __init__(self, evaluate: Asked) -> None:
        self.evaluate, self.so_far = evaluate, []

    def on_level(self, level: Level, so_far: Winner) -> None:
        self.at, self.so_far = len(self.evaluate.log), [*self.so_far, so_far]


@pytest.mark.parametrize("kind", [Refit, LeastSquares])
def test_without_a_refit_of_each_level_the_search_is_that_without_a_refit(kind):
    net = network()
    evaluate, plain = faithful(net), faithful(net)
    observer = Grown(evaluate)
    refitted = ranked(net, kind(each_level=False), evaluate, observer=observer)
    without = ranked(net, None, plain)
    assert not any(candidate.refitted for candidate, _ in evaluate.log[: observer.at])
    assert [refitted.mask_at(level) for level in range(4)] == [without.mask_at(level) for level in range(4)]
    assert [one.candidates for one in refitted.report.levels] == [one.candidates for one in without.report.levels]
    assert [one.score for one in refitted.report.levels] == [one.score for one in without.report.levels]
    assert not any(one.refitted for level in refitted.report.levels for one in level.candidates)
    assert len(evaluate.log) == len(plain.log)
    for level in (1, 2, 3):
        assert equal(refitted.weights_at(level), anew(net, refitted.mask_at(level), kind()))


def test_without_confirmation_the_winner_alone_is_refitted_at_the_end():
    net = network()
    evaluate = faithful(net)
    refitted = ranked(net, LeastSquares(each_level=False), evaluate, validation=Validation(confirm=0))
    assert sorted(refitted.refits) == [0, 3]
    assert equal(refitted.weights, anew(net, refitted.mask))
    seen = [candidate for candidate, _ in evaluate.log if candidate.refitted]
    assert seen
    assert all(candidate.mask == refitted.mask for candidate in seen)
    # the others are what they were judged as: the dense network pruned
    for level in (1, 2):
        mask, found = refitted.mask_at(level), refitted.weights_at(level)
        assert all(torch.equal(found[name], net.get_parameter(name) * mask[name]) for name in WEIGHTS)
        assert all(torch.equal(found[name], named(net)[name]) for name in found.keys() - {*WEIGHTS})


@pytest.mark.parametrize("after", [1.0, 0.5, math.nan])
def test_without_confirmation_a_refit_at_the_end_that_gains_nothing_is_not_taken(after):
    net = network()
    evaluate = by_turns(lambda mask: 1.0, lambda mask: after)
    winner = ranked(net, LeastSquares(each_level=False), evaluate, validation=Validation(confirm=0))
    assert winner.report.winner.level == 3
    assert sorted(winner.refits) == [0]
    assert all(torch.equal(winner.weights[name], net.get_parameter(name) * winner.mask[name]) for name in WEIGHTS)
    assert torch.equal(winner.weights["1.running_mean"], net[1].running_mean)


def test_a_search_that_accepts_nothing_refits_nothing_at_the_end():
    net = network()
    dense_alone = Asked(lambda candidate, folds: candidate.mask.sparsity == 0)
    winner = ranked(net, LeastSquares(each_level=False), dense_alone, tolerance=0.5)
    assert sorted(winner.refits) == [0]
    assert equal(winner.weights, winner.weights_at(0))


# ------------------------------------------------------------------------------------------------ as it was without


@pytest.mark.parametrize("race", [False, True])
def test_without_a_refit_a_calibration_changes_nothing(race):
    net = network()
    options = {"branches": 6, "tolerance": math.inf, "tree": LEVELS, "validation": Validation(race=race)}
    options["wheel"] = Wheel(8.0)
    one, two = faithful(net), faithful(net)
    plain = search(weights_of(net), one, **options)
    given = ranked(net, None, two, **options)
    assert plain.mask == given.mask
    assert [plain.mask_at(level) for level in range(4)] == [given.mask_at(level) for level in range(4)]
    assert plain.report.levels == given.report.levels
    assert [(key_of(mask.mask), folds) for mask, folds in one.log] == [
        (key_of(mask.mask), folds) for mask, folds in two.log
    ]
    assert not one.refitted
    assert given.refits == {}
    assert (given.report.refit, given.report.left_alone) == ("", {})
    assert given.weights.keys() == {*WEIGHTS}


@pytest.mark.parametrize("importance", ["magnitude", "activation", "obs"])
def test_the_same_seed_gives_the_same_winner(importance):
    net = network()
    wheel = Wheel(importance=importance)
    one, two, other = (ranked(net, wheel=wheel, seed=seed) for seed in (5, 5, 6))
    assert [one.mask_at(level) for level in range(4)] == [two.mask_at(level) for level in range(4)]
    assert all(equal(one.weights_at(level), two.weights_at(level)) for level in range(4))
    assert one.report.levels == two.report.levels
    assert one.mask != other.mask


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("each_level", [True, False])
def test_the_network_is_bit_for_bit_what_it_was(each_level, wrapped):
    net = network().train() if wrapped else network()
    before, ids = content(net), {name: id(one) for name, one in named(net).items()}
    ranked(net, LeastSquares(each_level=each_level), wheel=Wheel(importance="obs"))
    assert content(net) == before
    assert {name: id(one) for name, one in named(net).items()} == ids
    assert all(part.training == wrapped for part in net.modules())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in net.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [1, 8, 12, 30])
def test_the_network_is_bit_for_bit_what_it_was_when_the_evaluator_fails(when, error):
    net = network().train()
    before = content(net)
    inner = faithful(net)

    def score(candidate, folds):
        if len(inner.log) == when:
            raise error("enough")
        return inner(candidate, folds).score

    with pytest.raises(error):
        ranked(net, evaluate=Asked(score))
    assert content(net) == before
    assert all(part.training for part in net.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [1, 3, 6, 20])
def test_the_network_is_bit_for_bit_what_it_was_when_it_fails_on_a_calibration_batch(when, error):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = network(), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == when:
                raise error("enough")
            return self.net(x)

    module = Failing().train()
    before = content(module)
    weights = {name: one for name, one in module.named_parameters() if one.dim() > 1}
    options = {"branches": 4, "tolerance": math.inf, "tree": LEVELS}
    with pytest.raises(error):
        search(weights, Constant(), refit="least_squares", calibration=Calibration(module, inputs()), **options)
    assert content(module) == before
    assert all(part.training for part in module.modules())
    assert not any(part._forward_pre_hooks for part in module.modules())


class Constant:
    """Every network is as good as any."""

    folds = 1

    def __call__(self, candidate, folds):
        return Scores(1.0, 1.0)


def test_a_function_of_a_mask_does_not_see_a_refit():
    net = network()
    with pytest.raises(ValueError, match="does not see refitted values. Pass an Evaluator"):
        search(weights_of(net), lambda mask: 1.0, refit="batch_norm", calibration=Calibration(net, inputs()))


def test_what_was_found_so_far_has_the_refitted_weights():
    net = network()
    evaluate = faithful(net)
    observer = Grown(evaluate)
    ranked(net, evaluate=evaluate, observer=observer)
    assert [so_far.history.level for so_far in observer.so_far] == [1, 2, 3]
    for so_far in observer.so_far:
        assert equal(so_far.weights, anew(net, so_far.mask))


# ------------------------------------------------------------------------------------------------ errors


def refused(**options) -> list[PrunedWeights]:
    evaluate = Asked(lambda *_: 1.0)
    net = network()
    search(weights_of(net), evaluate, **{"calibration": Calibration(net, inputs()), **options})
    return evaluate.log


def test_a_refit_without_inputs_is_refused():
    for refit in ("least_squares", "batch_norm", LeastSquares(), Refit(each_level=False)):
        with pytest.raises(ValueError, match=r"refit is .*no inputs for it. Pass calibration=Calibration\(network, ba"):
            refused(refit=refit, calibration=None)


@pytest.mark.parametrize("importance", ["activation", "obs"])
def test_an_importance_of_inputs_without_inputs_is_refused(importance):
    with pytest.raises(ValueError, match=f"importance is '{importance}', but calibration is None. Pass cali"):
        refused(wheel=Wheel(importance=importance), calibration=None)


@pytest.mark.parametrize("word", ["", "obs", "LEAST_SQUARES", "none"])
def test_a_word_that_names_no_refit_is_refused(word):
    with pytest.raises(ValueError, match=f"refit is '{word}', but must be one of 'batch_norm', 'least_squares'"):
        refused(refit=word)


@pytest.mark.parametrize("wrong", [True, False, 0, 1, LeastSquares, ["least_squares"], nn.Linear(1, 1)])
def test_a_refit_of_the_wrong_kind_is_refused(wrong):
    with pytest.raises(TypeError, match="refit is .*must be None, one of batch_norm, least_squares, or a LeastSqu"):
        refused(refit=wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"batches": 0}, ValueError, "batches is 0, but must be at least 1"),
        ({"batches": 2.0}, TypeError, "batches is 2.0, but must be a whole number"),
        ({"each_level": 1}, TypeError, "each_level is 1, but must be True or False"),
        ({"finalists": 0}, ValueError, "finalists is 0, but must be at least 1"),
        ({"damping": -0.1}, ValueError, "damping is -0.1, but must be at least 0"),
        ({"damping": math.nan}, ValueError, "damping is nan"),
        ({"damping": "1"}, TypeError, "damping is '1', but must be a number"),
    ],
)
def test_choices_out_of_range_are_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        LeastSquares(**wrong)


@pytest.mark.parametrize("wrong", [-1, math.nan])
def test_an_allocation_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="allocation is"):
        Wheel(allocation=wrong)


# ------------------------------------------------------------------------------------------------ allocation


def pair() -> dict[str, Tensor]:
    return {"a": random(400, seed=1).double(), "b": random(20, 30, seed=2).double(), "c": random(200, seed=3).double()}


def drawn(wheel: Wheel, **options) -> tuple[list[Mask], Winner]:
    """Every distinct mask of a search in which chance decides what wins."""
    seen: list[Mask] = []

    def score(mask):
        seen.append(mask)
        return noise(mask, 0)

    defaults = {"branches": 5, "tolerance": math.inf, "tree": LEVELS, "wheel": wheel}
    return seen, search(pair(), score, **defaults | options)


@pytest.mark.parametrize("sharpness", [0.0, 4.0, math.inf])
def test_candidates_take_more_from_one_layer_or_another(sharpness):
    masks, winner = drawn(Wheel(sharpness, allocation=0.5))
    by_level = [[mask for mask in masks if mask.survivors == level.survivors] for level in winner.report.levels]
    assert [len(level) for level in by_level] == [5, 5, 5]
    parent = winner.mask_at(0)
    for number, level in enumerate(by_level, start=1):
        draws = math.floor(0.2 * parent.survivors + 0.5)
        for mask in level:
            assert mask <= parent
            assert mask.survivors == parent.survivors - draws
        if sharpness:  # without it importance has no part in the draw
            assert len({tuple(mask.densities.values()) for mask in level}) == 5
        parent = winner.mask_at(number)
    if sharpness == 4:
        before, after = (
            torch.tensor([list(mask.densities.values()) for mask in some]).std(0).mean()
            for some in (drawn(Wheel(sharpness))[0][1:6], by_level[0])
        )
        assert after > 0.01 + before


def test_without_allocation_the_masks_are_as_ever():
    for sharpness in (4.0, math.inf):
        plain, explicit = drawn(Wheel(sharpness)), drawn(Wheel(sharpness, allocation=0.0))
        assert plain[0] == explicit[0]
        assert plain[1].report.levels == explicit[1].report.levels


@pytest.mark.parametrize("sharpness", [4.0, math.inf])
def test_the_same_seed_gives_the_same_allocation(sharpness):
    wheel = Wheel(sharpness, allocation=0.4)
    one, two, other = drawn(wheel), drawn(wheel), drawn(wheel, seed=1)
    assert one[0] == two[0]
    assert one[0][1:6] != other[0][1:6]


@pytest.mark.parametrize("sharpness", [0.0, 4.0])
def test_with_a_wheel_for_each_layer_allocation_has_no_effect(sharpness):
    plain, wide = (drawn(Wheel(sharpness, scope="layer", allocation=width)) for width in (None, 2.0))
    assert plain[0] == wide[0]


def largest(weights: Mapping[str, Tensor], parent: Mask, survivors: int, leaning: Mapping[str, float]) -> Mask:
    """The mask of the weights that are largest when each layer is leant to."""
    leant = {name: (weight.abs() * math.exp(leaning[name])) * parent[name] for name, weight in weights.items()}
    threshold = torch.cat([one.flatten() for one in leant.values()]).topk(survivors).values[-1]
    return Mask({name: one >= threshold for name, one in leant.items()})


def test_a_childs_leaning_starts_at_its_parents():
    weights, width, seed = pair(), 0.3, 11
    seen, winner = drawn(Wheel(math.inf, allocation=width), seed=seed)
    leaning = dict.fromkeys(weights, 0.0)
    for level in winner.report.levels:
        parent = winner.mask_at(level.level - 1)
        added = {
            one.index: {name: width * normal(stream(seed, level.level, one.index, name)) for name in weights}
            for one in level.candidates
        }
        for index, own in added.items():
            leant = {name: leaning[name] + own[name] for name in weights}
            assert largest(weights, parent, level.survivors, leant) in seen, (level.level, index)
        leaning = {name: leaning[name] + added[level.winner][name] for name in weights}
        assert winner.mask_at(level.level) == largest(weights, parent, level.survivors, leaning)


def test_a_level_that_failed_leaves_no_leaning_behind():
    weights, width = pair(), 0.3
    wheel = Wheel(math.inf, allocation=width)
    # the first branch fails, the retry at half the rate does not
    winner = search(
        weights,
        lambda mask: float(mask.survivors != 960),
        branches=5,
        tolerance=0.5,
        wheel=wheel,
        tree=Tree(0.2, max_levels=1),
    )
    failed, accepted = winner.report.levels
    assert (failed.accepted, accepted.accepted) == (False, True)
    assert {one.index for one in accepted.candidates} == {5, 6, 7, 8, 9}
    leaning = {name: width * normal(stream(0, 1, accepted.winner, name)) for name in weights}
    assert winner.mask == largest(weights, winner.mask_at(0), accepted.survivors, leaning)


def densities(winner: Winner, evaluate: Asked) -> set[tuple[float, ...]]:
    """Per layer, of all candidates of the first level."""
    first = winner.report.levels[0].survivors
    return {tuple(one.mask.densities.values()) for one, _ in evaluate.log if one.mask.survivors == first}


@pytest.mark.parametrize(
    ("refit", "wheel", "differ"),
    [
        ("least_squares", MAGNITUDE, True),
        ("least_squares", Wheel(math.inf, allocation=0.0), False),
        (LeastSquares(each_level=False), MAGNITUDE, False),
        ("batch_norm", MAGNITUDE, False),
        ("batch_norm", Wheel(math.inf, allocation=0.5), True),
        (None, MAGNITUDE, False),
        (None, Wheel(math.inf, allocation=0.5), True),
        ("least_squares", Wheel(math.inf, scope="layer"), False),
    ],
)
def test_candidates_differ_in_allocation_where_levels_are_refitted_by_least_squares(refit, wheel, differ):
    net = network()
    evaluate = faithful(net)
    winner = ranked(net, refit, evaluate, wheel=wheel, tree=Tree(0.2, max_levels=1))
    assert (len(densities(winner, evaluate)) > 1) == differ


def test_a_refit_that_searches_the_allocation_does_so_by_0_3():
    net = network()
    default, explicit = (ranked(net, wheel=Wheel(allocation=width)) for width in (None, 0.3))
    assert default.report.levels == explicit.report.levels
    assert default.mask == explicit.mask


# ------------------------------------------------------------------------------------------------ chance


def test_normal_numbers_have_mean_0_and_variance_1():
    found = torch.tensor([normal(stream(0, 1, place, "layer")) for place in range(6000)], dtype=torch.float64)
    # five standard errors of the mean, the variance, the third and the fourth moment
    root = math.sqrt(len(found))
    assert abs(float(found.mean())) < 5 / root
    assert abs(float(found.var()) - 1) < 5 * math.sqrt(2) / root
    assert abs(float((found**3).mean())) < 5 * math.sqrt(15) / root
    assert abs(float((found**4).mean()) - 3) < 5 * math.sqrt(96) / root
    assert len(set(found.tolist())) == len(found)
    below = (found < 0.5).double().mean()
    assert abs(float(below) - 0.6914624612740131) < 5 * 0.4619 / root


def test_normal_numbers_are_independent_of_the_uniforms_of_the_weights():
    keys = [stream(0, 1, place, "layer") for place in range(2000)]
    index = torch.arange(20)
    both = torch.stack([torch.cat([torch.tensor([normal(key)]).double(), uniforms(key, index)]) for key in keys])
    found = torch.corrcoef(both.T)[0, 1:]
    assert float(found.abs().max()) < 5 / math.sqrt(len(keys))
    squares = torch.corrcoef(torch.cat([both[:, :1] ** 2, both[:, 1:]], 1).T)[0, 1:]
    assert float(squares.abs().max()) < 5 / math.sqrt(len(keys))


def test_normal_numbers_are_those_of_box_and_muller_from_counters_that_no_weight_has():
    key = stream(3, 1, 4, "layer")
    radius, angle = uniforms(key, torch.tensor([-1, -2])).tolist()
    assert normal(key) == math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)
    assert normal(key) == normal(key)
    assert normal(key) != normal(stream(3, 1, 4, "other"))


# ------------------------------------------------------------------------------------------------ report


@pytest.mark.parametrize(
    ("refit", "words"),
    [
        ("least_squares", "survivors by least squares, and running statistics, of the best candidate of a level"),
        ("batch_norm", "running statistics, of the best candidate of a level"),
        (LeastSquares(each_level=False), "survivors by least squares, and running statistics, at the end"),
        (Refit(each_level=False), "running statistics, at the end"),
        (LeastSquares(finalists=2), "survivors by least squares, and running statistics, of the best 2 candidates of"),
    ],
)
def test_the_report_says_what_was_refitted(refit, words):
    report = ranked(network(), refit).report
    assert report.refit.startswith(words)
    assert f"Refitted: {report.refit}." in str(report)
    assert f"Refitted: {report.refit}." in report.markdown()
    assert report.left_alone == {}
    assert "Not refitted" not in str(report)


def test_the_report_says_nothing_of_refits_where_there_are_none():
    report = ranked(network(), None).report
    assert (report.refit, report.left_alone) == ("", {})
    assert "efit" not in str(report)


def test_the_table_of_levels_is_as_without_a_refit():
    with_refit, without = (ranked(network(), refit).report for refit in ("least_squares", None))
    assert with_refit.rows()[0] == without.rows()[0]
    assert [row[:4] for row in with_refit.rows()] == [row[:4] for row in without.rows()]


def read_back(report: SearchReport) -> SearchReport:
    return SearchReport.from_dict(json.loads(json.dumps(report.to_dict())))


class Partly(nn.Module):
    """Two layers that can be refitted, one whose inputs cannot be seen, one that is never called."""

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
    winner = search(
        weights,
        Constant(),
        branches=3,
        tolerance=math.inf,
        tree=LEVELS,
        refit=LeastSquares(each_level=each_level),
        calibration=Calibration(net, inputs()),
    )
    report = winner.report
    assert report.left_alone.keys() == {"free", "unused.weight"}
    assert "its inputs cannot be seen" in report.left_alone["free"]
    assert "does not call it" in report.left_alone["unused.weight"]
    assert "Not refitted: free (" in str(report)
    for name in report.left_alone:
        assert torch.equal(winner.weights[name], weights[name] * winner.mask[name])
    assert read_back(report).left_alone == report.left_alone
    assert str(read_back(report)) == str(report)


def test_the_report_names_the_weights_whose_refit_was_undone():
    # float16 holds no number beyond 65504, and the survivor would have to be 480000.5
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1, bias=False)
            with torch.no_grad():
                self.net.weight.copy_(torch.tensor([[0.5, 60000.0]]))

        def forward(self, x):
            return self.net(x)

    net, x = Wide().half(), torch.rand(64, 1)
    batches = [torch.cat([x, 8 * x], 1).half()]
    name = "net.weight"
    calibration = Calibration(net, batches)
    winner = search(
        {name: net.net.weight},
        Asked(lambda candidate, folds: bool(candidate.mask[name][0, 0]), 1),
        refit=LeastSquares(damping=0.0),
        calibration=calibration,
        branches=8,
        tolerance=math.inf,
        wheel=Wheel(0.0),
        tree=Tree(pruning_rate=0.5, max_levels=1),
    )
    (level,) = winner.report.levels
    assert winner.mask[name].tolist() == [[True, False]]
    assert level.undone == {name: "its inputs or its solved weights are not finite"}
    assert f"Refit undone in the winner: {name} (its inputs or its solved weights are not finite)." in str(
        winner.report
    )
    assert winner.weights[name].tolist() == [[0.5, 0.0]]
    assert read_back(winner.report).levels[0].undone == level.undone
    assert str(read_back(winner.report)) == str(winner.report)


def test_undone_refits_at_the_end_are_told_as_well():
    # as above; the refit is that of the end
    net = nn.Linear(2, 1, bias=False).half()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, 60000.0]]))
    x = torch.rand(64, 1)
    winner = search(
        {"weight": net.weight},
        Asked(lambda one, _: float(bool(one.mask["weight"][0, 0]))),
        refit=LeastSquares(damping=0.0, each_level=False),
        calibration=Calibration(net, [torch.cat([x, 8 * x], 1).half()]),
        branches=8,
        tolerance=math.inf,
        wheel=Wheel(0.0),
        tree=Tree(pruning_rate=0.5, max_levels=1),
    )
    assert winner.weights["weight"].tolist() == [[0.5, 0.0]]
    assert "Refit undone in the winner: weight (its inputs or its solved weights are not finite)." in str(winner.report)


@pytest.mark.parametrize("refit", ["least_squares", Refit(each_level=False), None])
def test_a_report_survives_json(refit):
    report = ranked(network(), refit).report
    read = read_back(report)
    assert read.to_dict() == report.to_dict()
    assert str(read) == str(report)
    assert read.refit == report.refit
    assert [[one.refitted for one in level.candidates] for level in read.levels] == [
        [one.refitted for one in level.candidates] for level in report.levels
    ]


def test_reports_from_before_there_were_refits_can_be_read():
    old = ranked(network(), None).report.to_dict()
    for name in ("refit", "left_alone"):
        del old[name]
    for level in old["levels"]:
        del level["undone"]
        for candidate in level["candidates"]:
            del candidate["refitted"]
    read = SearchReport.from_dict(old)
    assert (read.refit, read.left_alone, read.levels[0].undone) == ("", {}, {})
