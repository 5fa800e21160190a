"""The journal: a search that is cut off anywhere and resumed ends like one that was not cut off."""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_roulette import (
    Batches,
    Calibration,
    PrunedWeights,
    Resamples,
    Scores,
    Singles,
    Tree,
    Validation,
    Wheel,
    search,
)
from lightning_roulette.judge.journal import Journal, fingerprint, lines_in
from lightning_roulette.judge.noted import Noted
from tests.support.evaluators import Logged, Sampled, Telling, key_of, noise

SEARCH = "0" * 32


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=chance) for name, size in (("a", (6, 8)), ("b", (40,)))}


def few_wrong(mask, fold: int) -> int:
    return int((1 - mask.survivors / mask.size) * 6 + 2 * noise(mask, fold))


class Resampled(Logged):
    """Records outcomes that are scored by their samples."""

    def recorded(self, candidate: PrunedWeights, folds) -> tuple[Scores, Resamples]:
        values = torch.tensor([self.score(candidate.mask, fold) for fold in folds for _ in range(3)])
        return self(candidate, folds), Resamples(lambda index: float(values[index].median()), len(values))


class Batched(Logged):
    """Records outcomes of batches of unequal size."""

    def recorded(self, candidate: PrunedWeights, folds) -> tuple[Scores, Batches]:
        values = torch.tensor([self.score(candidate.mask, fold) for fold in folds])
        return self(candidate, folds), Batches(values, torch.arange(1, len(values) + 1))


def slope(mask, fold: int) -> float:
    return mask.survivors / mask.size / 7 + 0.1 * noise(mask, fold)


EVALUATORS = {
    "plain": lambda: Logged(slope, 8),
    "few at once": lambda: Logged(slope, 8, at_once=2),
    "telling nothing": lambda: Telling(slope, 8),
    "singles": lambda: Sampled(few_wrong, 8, 30),
    "batches": lambda: Batched(slope, 8),
    "resamples": lambda: Resampled(slope, 8),
    "nan": lambda: Logged(lambda mask, fold: math.nan if mask.survivors < 60 else slope(mask, fold), 8),
}


def run(evaluate, **options):
    settings = {"branches": 4, "tolerance": 0.1, "tree": Tree(0.15, patience=2, max_levels=5), "seed": 3}
    return search(weights(), evaluate, **settings | options)


def found(winner) -> tuple:
    """All of a winner that must be equal, bit for bit."""
    report = winner.report.to_dict() | {"seconds": None}
    return repr(report), key_of(winner.mask), {name: one.tolist() for name, one in winner.weights.items()}


def work(evaluate: Logged) -> int:
    """Number of validations of networks that are not dense."""
    return sum(mask.survivors < mask.size for mask, _ in evaluate.log)


def resumed(path: Path, evaluate, **options):
    return run(Noted(evaluate, Journal(str(path), SEARCH, lines_in(str(path), SEARCH))), **options)


@pytest.mark.parametrize("kind", EVALUATORS)
def test_a_search_with_a_journal_equals_one_without(tmp_path, kind):
    noted, plain = EVALUATORS[kind](), EVALUATORS[kind]()
    assert found(resumed(tmp_path / "a" / "journal", noted)) == found(run(plain))
    assert [(key_of(mask), folds) for mask, folds in noted.log] == [(key_of(mask), folds) for mask, folds in plain.log]


@pytest.mark.parametrize(
    ("kind", "confidence"), [*((kind, None) for kind in EVALUATORS), ("batches", 0.9), ("resamples", 0.9)]
)
def test_a_network_in_the_journal_is_not_validated_again(tmp_path, kind, confidence):
    path, options = tmp_path / "journal", {"confidence": confidence, "tolerance": 0.4}
    first, again = EVALUATORS[kind](), EVALUATORS[kind]()
    whole = resumed(path, first, **options)
    content = path.read_bytes()
    assert found(resumed(path, again, **options)) == found(whole) == found(run(EVALUATORS[kind](), **options))
    assert work(again) == 0 < work(first)
    assert again.log  # the dense network is validated in any case
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", EVALUATORS)
def test_a_search_that_is_cut_off_anywhere_ends_as_if_it_was_not(tmp_path, kind):
    path, whole = tmp_path / "journal", EVALUATORS[kind]()
    expected = found(resumed(path, whole))
    content, chance = path.read_bytes(), torch.Generator().manual_seed(5)
    cuts = [0, 1, len(content) - 1, len(content), *torch.randint(len(content), (6,), generator=chance).tolist()]
    works = {}
    for cut in cuts:
        path.write_bytes(content[:cut])
        again = EVALUATORS[kind]()
        assert found(resumed(path, again)) == expected
        assert path.read_bytes() == content  # whole again, for the next time
        works[cut] = work(again)
    assert works[0] == work(whole)
    assert works[len(content)] == 0
    in_order = [works[cut] for cut in sorted(works)]
    assert in_order == sorted(in_order, reverse=True)


@pytest.mark.parametrize("damage", [bytes(40), b"1", b'{"answer": 1}', b"\xff\xfe"])
def test_a_damaged_line_and_all_after_it_are_ignored(tmp_path, damage):
    path, whole = tmp_path / "journal", EVALUATORS["singles"]()
    expected = found(resumed(path, whole))
    content = path.read_bytes()
    lines = content.split(b"\n")
    lines[40] = damage
    path.write_bytes(b"\n".join(lines))
    again = EVALUATORS["singles"]()
    assert found(resumed(path, again)) == expected
    assert 0 < work(again) < work(whole)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("kind", "confidence"), [*((kind, None) for kind in EVALUATORS), ("batches", 0.9), ("resamples", 0.9)]
)
def test_answers_are_found_in_any_order(tmp_path, kind, confidence):
    path, options = tmp_path / "journal", {"confidence": confidence, "tolerance": 0.4}
    expected = found(resumed(path, EVALUATORS[kind](), **options))
    head, *lines = path.read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    path.write_bytes(head + b"".join(lines))
    again = EVALUATORS[kind]()
    assert found(resumed(path, again, **options)) == expected
    assert work(again) == 0


def test_an_answer_that_is_missing_is_validated_alone(tmp_path):
    path, whole = tmp_path / "journal", EVALUATORS["singles"]()
    expected = found(resumed(path, whole))
    head, *lines = path.read_bytes().splitlines(keepends=True)
    missing = lines[25]
    path.write_bytes(head + b"".join(line for line in lines if line != missing))
    again = EVALUATORS["singles"]()
    assert found(resumed(path, again)) == expected
    assert work(again) == 1
    assert path.read_bytes().splitlines(keepends=True) == [head, *(line for line in lines if line != missing), missing]


def test_a_search_uses_the_answers_of_one_that_asked_in_another_order(tmp_path):
    path, options = tmp_path / "journal", {"wheel": Wheel(1.0), "validation": Validation(race=False)}
    resumed(path, Logged(slope, 8), branches=5, tree=Tree(0.15, max_levels=3), **options)
    again, plain = Logged(slope, 8), Logged(slope, 8)
    options |= {"branches": 3, "tree": Tree(0.15, max_levels=1)}
    assert found(resumed(path, again, **options)) == found(run(plain, **options))
    drawn = {key_of(mask) for mask, _ in plain.log if mask.sparsity > 0}
    assert len(drawn) == 3  # among the five of the first search
    assert work(plain) - work(again) >= 3


def test_an_answer_is_used_once():
    """A search that asked twice asks twice when it is started again, and gets both answers in turn."""
    question, given = {"asked": "scores"}, iter([1.0, 2.0, 3.0])
    line = '{"answer": %s, "question": {"asked": "%s"}}'
    lines = [line % (0.0, "first"), line % (1.0, "scores"), line % (2.0, "scores")]
    journal = Journal(None, SEARCH, lines)
    assert journal.answer({"asked": "first"}, lambda: 0.0, False) == 0.0
    assert [journal.answer(question, lambda: pytest.fail("evaluated"), False) for _ in range(2)] == [1.0, 2.0]
    assert journal.answer(question, lambda: next(given), False) == 1.0


def test_without_an_answer_to_the_first_question_the_journal_is_void(tmp_path):
    path = tmp_path / "journal"
    resumed(path, Logged(slope, 8))
    head, _, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + b"".join(lines))
    assert saved_work(path, lambda: Logged(slope, 8)) == 0


class Together:
    """Asks the other process, a thread, whether a condition is true there too."""

    def __init__(self) -> None:
        self.barrier, self.said = threading.Barrier(2, timeout=20), [False, False]

    def agreed(self, rank: int) -> Callable[[bool], bool]:
        def ask(here: bool) -> bool:
            self.said[rank] = here
            self.barrier.wait()
            both = all(self.said)
            self.barrier.wait()
            return both

        return ask


@pytest.mark.parametrize("differs", ["nothing", "some networks", "the dense network", "the first question"])
def test_processes_use_the_same_answers_even_if_their_networks_differ(differs):
    asked = [f"{number}" for number in range(12)]
    lines = [json.dumps({"question": {"asked": one}, "answer": number}) for number, one in enumerate(asked)]
    together, evaluated = Together(), ([], [])

    def process(rank: int) -> None:
        journal = Journal(None, SEARCH, lines, together.agreed(rank))
        for number, one in enumerate(asked):
            other = rank and number in {"some networks": (1, 4, 7, 10), "the first question": (0,)}.get(differs, ())
            wrong = rank and differs == "the dense network" and number == 1

            def evaluate(number=number, wrong=wrong) -> int:
                evaluated[rank].append(number)
                return -1 if wrong else number

            journal.answer({"asked": f"other {one}" if other else one}, evaluate, number == 1)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(30)
    expected = {"nothing": [0, 1], "some networks": [0, 1, 4, 7, 10]}.get(differs, list(range(12)))
    assert evaluated == (expected, expected)


def saved_work(path: Path, make, **options) -> int:
    """Validations that a journal saves. The search must end as one without a journal."""
    again, plain = make(), make()
    assert found(resumed(path, again, **options)) == found(run(plain, **options))
    return work(plain) - work(again)


def test_a_dense_network_with_another_score_makes_the_journal_void(tmp_path):
    path = tmp_path / "journal"
    resumed(path, Logged(slope, 8))
    assert saved_work(path, lambda: Logged(lambda mask, fold: slope(mask, fold) + 1e-12, 8)) == 0


@pytest.mark.parametrize("fold", [0, 7])
def test_outcomes_of_the_dense_network_that_differ_make_the_journal_void(tmp_path, fold):
    """The samples of a fold of either half have changed places. Its scores are equal."""

    class Swapped(Sampled):
        def outcomes(self, mask, folds):
            values = super().outcomes(mask, folds).values.clone()
            if fold in folds:
                place = 30 * list(folds).index(fold)
                values[place : place + 30] = values[place : place + 30].flip(0)
            return Singles(values, 0.0, 1.0)

    path, wrong = tmp_path / "journal", lambda mask, fold: 1 + few_wrong(mask, fold)
    resumed(path, Sampled(wrong, 8, 30))
    assert saved_work(path, lambda: Swapped(wrong, 8, 30)) == 0
    again = Swapped(wrong, 8, 30)
    resumed(path, again)
    assert work(again) == 0  # the file has all answers of the search that dropped it


@pytest.mark.parametrize(
    ("other", "kept"), [({"wheel": Wheel(2.0)}, False), ({"tree": Tree(0.15, max_levels=1)}, True)]
)
def test_scores_are_replayed_as_long_as_the_same_networks_are_validated(tmp_path, other, kept):
    path = tmp_path / "journal"
    resumed(path, Logged(slope, 8))
    assert (saved_work(path, lambda: Logged(slope, 8), **other) > 0) == kept


def test_refitted_networks_are_distinguished_by_their_values(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    of = {"0.weight": net[0].weight, "2.weight": net[2].weight}

    class Values(Logged):
        def __call__(self, candidate, folds):
            self.log.append((candidate.mask, tuple(folds)))
            score = -sum(float((candidate.weights[name] - one.detach()).square().sum()) for name, one in of.items())
            return Scores(score, score)

    def with_inputs(path, seed):
        evaluate, inputs = Values(slope, 8), torch.randn(256, 8, generator=torch.Generator().manual_seed(seed))
        journal = Journal(str(path), SEARCH, lines_in(str(path), SEARCH))
        options = {"branches": 3, "tolerance": 100.0, "tree": Tree(0.2, max_levels=3)}
        options |= {"wheel": Wheel(importance="magnitude"), "refit": "least_squares"}
        return search(of, Noted(evaluate, journal), calibration=Calibration(net, [inputs]), **options), evaluate

    first, _ = with_inputs(tmp_path / "journal", 1)
    second, again = with_inputs(tmp_path / "journal", 1)
    assert found(first) == found(second)
    assert work(again) == 0
    # the first branch is drawn before anything is refitted, and then the same mask is refitted to other inputs
    winner, other = with_inputs(tmp_path / "journal", 2)
    expected, plain = with_inputs(tmp_path / "another", 2)
    assert found(winner) == found(expected) != found(first)
    assert 0 < work(other) < work(plain)


def test_a_journal_of_another_search_is_replaced(tmp_path):
    path = tmp_path / "journal"
    resumed(path, Logged(slope, 8))
    assert lines_in(str(path), SEARCH)
    assert lines_in(str(path), "1" * 32) == []
    assert lines_in(str(tmp_path / "nowhere"), SEARCH) == []
    run(Noted(Logged(slope, 8), Journal(str(path), "1" * 32)))
    assert lines_in(str(path), SEARCH) == []
    assert lines_in(str(path), "1" * 32)


def test_without_a_path_nothing_is_written_and_a_removed_journal_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(Noted(Logged(slope, 8), Journal(None, SEARCH)))
    assert list(tmp_path.iterdir()) == []
    journal = Journal("journal", SEARCH)
    journal.remove()  # there is none yet
    run(Noted(Logged(slope, 8), journal))
    assert len(list(tmp_path.iterdir())) == 1
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_cannot_be_written_warns_once_and_does_not_stop_the_search(tmp_path):
    (tmp_path / "file").write_text("")
    noted = Noted(Logged(slope, 8), Journal(str(tmp_path / "file" / "journal"), SEARCH))
    with pytest.warns(UserWarning, match="the progress of the search cannot be saved") as caught:
        winner = run(noted)
    assert len(caught) == 1
    assert found(winner) == found(run(Logged(slope, 8)))


@pytest.mark.parametrize("here", [True, False])
def test_an_answer_is_replayed_only_if_all_processes_agree(tmp_path, here):
    path = tmp_path / "journal"
    whole = Logged(slope, 8)
    resumed(path, whole)
    again, asked = Logged(slope, 8), []

    def agreed(same: bool) -> bool:
        asked.append(same)
        return same and (here or len(asked) <= 40)

    journal = Journal(None, SEARCH, lines_in(str(path), SEARCH), agreed)
    assert found(run(Noted(again, journal))) == found(run(Logged(slope, 8)))
    assert all(asked)
    dense = len(whole.log) - work(whole)
    replayed = 40 - 2 * dense  # answers about the dense network are agreed on twice, also when they were verified
    assert work(again) == (0 if here else work(whole) - replayed) < work(whole)


def test_a_noted_evaluator_has_the_attributes_of_the_evaluator():
    logged = Logged(slope, 8, at_once=2)
    logged.undivided_because = "loader 0 gives 3 samples, fewer than 16"
    noted = Noted(logged, Journal(None, SEARCH))
    assert (noted.folds, noted.at_once, noted.at_least, noted.records) == (8, 2, 1, False)
    assert noted.undivided_because == logged.undivided_because
    assert Noted(Sampled(few_wrong, 8, 30), Journal(None, SEARCH)).records


def test_a_fingerprint_depends_on_networks_and_settings_and_nothing_else():
    def scoring():
        pass

    same = fingerprint(weights(), Wheel(2.0), 3, scoring)
    assert same == fingerprint({name: one.clone() for name, one in weights().items()}, Wheel(2.0), 3, scoring)
    nudged = {name: one + (name == "b") * 1e-6 for name, one in weights().items()}
    renamed = {name.upper(): one for name, one in weights().items()}
    others = [(weights(1), Wheel(2.0), 3), (nudged, Wheel(2.0), 3), (renamed, Wheel(2.0), 3), (weights(), Wheel(), 3)]
    others += [(weights(), Wheel(2.0), 4), ({"a": weights()["a"].view(8, 6), "b": weights()["b"]}, Wheel(2.0), 3)]
    prints = [fingerprint(*other, scoring) for other in others]
    assert len({same, *prints}) == 7
    assert fingerprint({}, lambda: 1) == fingerprint({}, lambda: 2)  # the address of a function does not count
