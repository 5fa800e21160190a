"""Searches whose refit chooses which weights stay, so that the masks of successive levels do not nest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_roulette import Calibration, LeastSquares, Mask, PrunedWeights, Tree, Validation, Wheel, search
from lightning_roulette.judge.journal import Journal, lines_in
from lightning_roulette.judge.noted import Noted
from lightning_roulette.mask.history import History
from lightning_roulette.refit.refitted import Refitted
from lightning_roulette.search.gradual import Cuts, Gradual
from lightning_roulette.search.refitter import Refitter
from lightning_roulette.search.winner import load
from tests.support.choosing import Choosing, chosen, nests
from tests.support.refits import LEVELS, Asked, SoFar, faithful, inputs, masks_of, named, network, weights_of

SEARCH = "0" * 32


def scored(net, folds: int = 8) -> Asked:
    """Scores a network by its weights, and every fold a little otherwise. A refit improves the score."""
    wanted = {name: one.detach().clone() for name, one in weights_of(net).items()}

    def score(candidate: PrunedWeights, asked) -> float:
        lost = sum(float((candidate.weights[name] - one).square().sum()) for name, one in wanted.items())
        return (100 if candidate.refitted else 0) - lost * (1 + sum(asked) / 100)

    return Asked(score, folds)


def grown(net, evaluate=None, **options):
    settings = {"branches": 3, "tolerance": math.inf, "tree": LEVELS, "wheel": Wheel(8.0), "seed": 5}
    settings |= {"refit": LeastSquares(finalists=2), "calibration": Choosing(net, inputs())}
    return search(weights_of(net), evaluate or scored(net), **settings | options)


def judged(evaluate: Asked) -> list[PrunedWeights]:
    """The networks that were judged after a refit, each once."""
    found = {candidate.mask.digest: candidate for candidate in evaluate.refitted}
    return list(found.values())


@pytest.mark.parametrize("each_level", [True, False])
@pytest.mark.parametrize("confirm", [0.5, 0.0])
def test_every_level_has_the_mask_and_the_weights_that_were_judged(each_level, confirm):
    net = network()
    evaluate = scored(net)
    refit = LeastSquares(finalists=2, each_level=each_level)
    validation = Validation(confirm=confirm, race=False)
    winner = grown(net, evaluate, refit=refit, validation=validation)
    for candidate in evaluate.refitted:  # a drawn mask lies within its parent's, a chosen one is that of its values
        assert candidate.mask <= Mask.of_nonzeros({name: candidate.refitted[name] for name in candidate.mask})
    by_digest = {one.mask.digest: one for one in judged(evaluate)}
    chain = winner.report.accepted
    assert [level.level for level in chain] == [1, 2, 3]
    levels = [1, 2, 3] if each_level or confirm else [3]
    for level in levels:
        mask, found = winner.mask_at(level), winner.weights_at(level)
        assert mask.survivors == chain[level - 1].survivors
        assert all(torch.equal(found[name], one) for name, one in by_digest[mask.digest].weights.items())
        assert all(torch.equal(found[name] != 0, kept) for name, kept in mask.items())
    assert not nests(masks_of(winner))
    assert winner.mask == winner.mask_at(3)
    assert (
        winner.report.survivors
        == winner.mask.survivors
        == int(winner.mask.counts["0.weight"]) + sum(winner.mask.counts[name] for name in ("3.weight", "5.weight"))
    )


def test_the_winner_is_loaded_and_read_back_with_its_levels():
    net = network()
    winner = grown(net)
    read = History.from_state(winner.history.state())
    assert [read.mask_at(level) for level in range(4)] == masks_of(winner)
    on_cpu = winner.cpu()
    load(net, winner)
    assert Mask.of_nonzeros(weights_of(net)) == winner.mask == on_cpu.mask
    assert all(torch.equal(named(net)[name], one) for name, one in winner.weights.items())


def test_the_parent_of_a_level_is_the_network_that_was_chosen():
    net = network()
    evaluate = scored(net)
    winner = grown(net, evaluate, tree=Tree(0.2, max_levels=2), validation=Validation(race=False))
    first = winner.mask_at(1)
    drawn = [one.mask for one in evaluate.refitted if one.mask.survivors == winner.mask_at(2).survivors]
    assert any(mask <= first for mask in drawn)  # candidates of level 2 as they were drawn
    assert any(chosen(mask).digest == winner.mask_at(2).digest for mask in drawn if mask <= first)


def test_the_chain_is_fixed_before_it_is_confirmed_and_the_densest_comes_first():
    net = network()
    evaluate = scored(net)
    steps = SoFar(evaluate)
    winner = grown(net, evaluate, observer=steps, validation=Validation(confirm=0.5))
    held_out = tuple(range(4, 8))
    confirmed = [candidate.mask for candidate, folds in evaluate.log[steps.at :] if folds == held_out]
    assert confirmed == [winner.mask_at(level) for level in (1, 2, 3)]
    before = steps.so_far[-1]
    assert [before.mask_at(level) for level in range(4)] == masks_of(winner)
    assert all(level.held_out_score is not None for level in winner.report.accepted)


def test_a_level_that_misses_the_held_out_floor_leaves_the_winner_before_it():
    net = network()
    evaluate = Asked(lambda candidate, folds: float(min(folds) < 4 or candidate.mask.survivors > 164), 8)
    winner = grown(net, evaluate, tolerance=0.0)
    assert [level.survivors for level in winner.report.accepted] == [205, 164, 131]
    assert [level.held for level in winner.report.accepted] == [True, False, None]
    assert (winner.history.level, winner.report.winner.level, winner.history.deepest) == (1, 1, 3)
    assert winner.mask == winner.mask_at(1)
    assert winner.mask.survivors == winner.report.survivors == 205
    assert not nests(masks_of(winner))


def resumed(path, net, **options):
    evaluate = faithful(net, 8)
    winner = grown(net, Noted(evaluate, Journal(str(path), SEARCH, lines_in(str(path), SEARCH))), **options)
    return winner, evaluate


def pruned_work(evaluate: Asked) -> int:
    return sum(one.mask.survivors < one.mask.size for one, _ in evaluate.log)


@pytest.mark.usefixtures("any_calibration_fits")
@pytest.mark.parametrize("kind", [Choosing, Calibration], ids=["by a script", "on the Gram matrix"])
def test_a_killed_search_goes_on_from_its_journal(tmp_path, kind):
    path, net = tmp_path / "journal", network()
    options = {"calibration": kind(net, inputs()), "refit": LeastSquares(finalists=2, choose=True)}
    whole, first = resumed(path, net, **options)
    assert not nests(masks_of(whole))
    content = path.read_bytes()
    for share in (0.3, 0.6, 1.0):
        path.write_bytes(content[: int(share * len(content))])
        winner, again = resumed(path, net, **options)
        assert masks_of(winner) == masks_of(whole)
        assert winner.report.to_dict() | {"seconds": 0} == whole.report.to_dict() | {"seconds": 0}
        assert (pruned_work(again) == 0) == (share == 1.0)
        assert pruned_work(again) < pruned_work(first)


def test_between_epochs_a_weight_that_was_pruned_is_never_revived():
    net = network()
    one = Gradual(Cuts(2, math.inf, None, 3, LeastSquares(), Wheel(), Tree(0.3), Validation(confirm=0.0)))
    calibration = Choosing(net, inputs())
    one.judge(weights_of(net), scored(net), calibration)
    cut, before = one.cut(1), one.mask
    one.judge({name: cut.weights[name] for name in cut.mask}, scored(net), calibration)
    with pytest.raises(RuntimeError, match="a cut kept weights that an earlier cut had pruned"):
        one.cut(2)
    assert one.mask == before
    assert len(one.report.levels) == 1


def test_a_refit_that_keeps_another_number_of_weights_is_refused():
    class Greedy(Choosing):
        def refit(self, mask: Mask, how="least_squares", allowed=None, **choices) -> Refitted:
            return replace(super().refit(mask, how, **choices), mask=Mask.full(weights_of(self._module)))

    net = network()
    mask = Mask({name: torch.arange(one.numel()).view(one.shape) > 9 for name, one in weights_of(net).items()})
    with pytest.raises(RuntimeError, match="a refit kept 256 weights, but the level keeps 226"):
        Refitter(weights_of(net), LeastSquares(), Greedy(net, inputs())).refit(mask)
    assert isinstance(Greedy(net, inputs()), Calibration)
