"""The report: frozen records that survive JSON, and read the same in every unit."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest

from lightning_roulette import Candidate, Level, Method, SearchReport, StopReason


def branch(*scores: float, sparsity: float = 0.2) -> tuple[Candidate, ...]:
    return tuple(Candidate(index, sparsity, score, rank=score) for index, score in enumerate(scores))


LEVELS = (
    Level(1, 0.2, 0.2, 8000, branch(0.95, 0.97, 0.93), winner=1, accepted=True),
    Level(2, 0.2, 0.36, 6400, branch(math.nan, math.nan, math.nan, sparsity=0.36), winner=None, accepted=False),
    Level(2, 0.1, 0.28, 7200, branch(math.nan, 0.5, 0.962, 0.3, sparsity=0.28), winner=2, accepted=True),
    Level(3, 0.1, 0.352, 6480, branch(0.1, 0.2, sparsity=0.352), winner=1, accepted=False),
)
REPORT = SearchReport("val_acc", "max", 0.965, 0.005, 3, -7, 10_000, LEVELS, StopReason.DECLINED, 13, 4.25)
DENSE = replace(REPORT, levels=(LEVELS[3],))
# judged on confirmation folds, and certified: the first accepted level held, the second did not
HELD = replace(LEVELS[0], error=0.002, held_out_score=0.9511, held_out_error=0.0021, p_value=0.0123, held=True)
MISSED = replace(LEVELS[2], error=0.003, held_out_score=0.94, held_out_error=math.nan, p_value=0.6, held=False)
CONFIRMED = replace(
    REPORT,
    levels=(HELD, LEVELS[1], MISSED, LEVELS[3]),
    validations=7.125,
    rank_by="val_loss",
    folds=(8, 8),
    held_out_dense=0.9523,
    confidence=0.95,
    method=Method.BETTING,
    samples=5000,
)


def through_json(report: SearchReport) -> SearchReport:
    return SearchReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))


def assert_same(one: SearchReport, other: SearchReport) -> None:
    # the text of a NaN is equal to itself, a NaN is not; a tuple is told from a list, and inf from "inf"
    assert repr(one) == repr(other)


def test_the_winner_is_the_slimmest_accepted_level():
    assert REPORT.accepted == (LEVELS[0], LEVELS[2])
    assert REPORT.winner == LEVELS[2]
    assert (REPORT.sparsity, REPORT.survivors, REPORT.search_score) == (0.28, 7200, 0.962)


def test_without_an_accepted_level_the_network_is_dense():
    assert DENSE.winner is None
    assert DENSE.accepted == ()
    assert (DENSE.sparsity, DENSE.survivors, DENSE.search_score) == (0.0, 10_000, 0.965)


def test_the_winner_is_the_slimmest_level_that_held():
    assert CONFIRMED.accepted == (HELD, MISSED)
    assert CONFIRMED.winner == HELD
    assert (CONFIRMED.sparsity, CONFIRMED.survivors, CONFIRMED.search_score) == (0.2, 8000, 0.97)
    both = replace(CONFIRMED, levels=(HELD, replace(MISSED, held=True)))
    assert both.winner == both.levels[1]


def test_every_accepted_level_counts_until_the_confirmation_begins():
    grown = replace(CONFIRMED, levels=LEVELS)
    assert grown.winner == LEVELS[2]
    assert math.isnan(grown.decline)
    begun = replace(CONFIRMED, levels=(HELD, *LEVELS[1:]))
    assert begun.winner == HELD


def test_where_no_level_held_the_network_is_dense():
    report = replace(CONFIRMED, levels=(replace(HELD, held=False), *LEVELS[1:]))
    assert report.winner is None
    assert (report.sparsity, report.survivors, report.search_score) == (0.0, 10_000, 0.965)
    assert report.decline == 0.0


def test_the_decline_is_that_on_data_that_ranked_nothing():
    assert replace(CONFIRMED, levels=(HELD,)).decline == pytest.approx(0.9523 - 0.9511)
    assert CONFIRMED.decline == 0.005  # halfway to the level that did not hold would be more than is tolerated
    assert REPORT.decline == pytest.approx(0.965 - 0.962)
    assert DENSE.decline == 0.0
    better = replace(CONFIRMED, levels=(replace(HELD, held_out_score=0.96),))
    assert better.decline == 0.0


def test_dictionaries_of_earlier_versions_are_read():
    former = {"held_out_score": "gated", "held_out_error": "gated_error"}
    fields = CONFIRMED.to_dict()
    fields["gated_dense"] = fields.pop("held_out_dense")
    fields["shared"] = fields.pop("undivided_because")
    fields["levels"] = [{former.get(name, name): one for name, one in level.items()} for level in fields["levels"]]
    assert {"gated", "gated_error"} <= fields["levels"][0].keys()
    assert SearchReport.from_dict(json.loads(json.dumps(fields))).to_dict() == CONFIRMED.to_dict()


@pytest.mark.parametrize(
    ("missed", "expected"),
    [((), 0.9523 - 0.9495), ((0.947,), 0.9523 - (0.9495 + 0.947) / 2), ((0.93,), 0.005), ((0.9515,), 0.9523 - 0.9495)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_decline_is_halfway_from_the_largest_that_held_to_the_first_that_did_not(sign, missed, expected):
    held_out = [(0.951, True), (0.9495, True), (0.9520, True), *((one, False) for one in missed)]
    levels = tuple(
        replace(HELD, level=i + 1, held_out_score=sign * one, held=held) for i, (one, held) in enumerate(held_out)
    )
    mode = "max" if sign == 1 else "min"
    report = replace(CONFIRMED, mode=mode, held_out_dense=sign * 0.9523, levels=levels)
    assert report.winner == levels[2]
    assert report.decline == pytest.approx(expected)


@pytest.mark.parametrize(("mode", "floor"), [("max", 0.9473), ("min", 0.9573)])
def test_the_confirmation_folds_have_a_floor_of_their_own(mode, floor):
    assert replace(CONFIRMED, mode=mode).held_out_floor == pytest.approx(floor)
    assert replace(REPORT, mode=mode).held_out_floor is None


def test_the_score_of_a_level_is_its_winners():
    assert [level.score for level in LEVELS if level.winner is not None] == [0.97, 0.962, 0.2]
    assert math.isnan(LEVELS[1].score)


def test_the_winner_is_found_by_its_number_and_not_its_place():
    retried = tuple(Candidate(index, 0.2, index / 10, index / 10) for index in (3, 4, 5))
    assert Level(1, 0.1, 0.2, 80, retried, winner=4, accepted=True).score == 0.4


def test_the_spread_leaves_nan_out():
    assert LEVELS[0].spread == (0.93, 0.95, 0.97)
    assert LEVELS[2].spread == (0.3, 0.5, 0.962)
    assert LEVELS[3].spread == pytest.approx((0.1, 0.15, 0.2))
    assert all(math.isnan(value) for value in LEVELS[1].spread)


@pytest.mark.parametrize(("mode", "floor"), [("max", 0.96), ("min", 0.97)])
def test_the_floor_lies_on_the_worse_side(mode, floor):
    assert replace(REPORT, mode=mode).floor == pytest.approx(floor)


def test_a_metric_to_be_minimised_is_reported_in_its_own_units():
    scored = replace(REPORT, monitor="score", dense_score=-0.5, tolerance=0.1, score=-0.55)
    loss = scored.in_metric("val_loss", "min")
    assert (loss.monitor, loss.mode, loss.dense_score, loss.score) == ("val_loss", "min", 0.5, 0.55)
    assert loss.floor == pytest.approx(0.6)
    assert [level.score for level in loss.levels if level.winner is not None] == [-0.97, -0.962, -0.2]
    assert loss.levels[0].spread == (-0.97, -0.95, -0.93)
    assert loss.search_score == -0.962
    # ranks stay as they ordered the branch
    assert [one.rank for one in loss.levels[0].candidates] == [0.95, 0.97, 0.93]


def test_a_confirmed_search_is_reported_in_the_units_of_its_metric():
    negative = replace(
        CONFIRMED,
        dense_score=-0.5,
        held_out_dense=-0.52,
        tolerance=0.1,
        levels=(replace(HELD, held_out_score=-0.55), MISSED),
    )
    loss = negative.in_metric("val_loss", "min")
    assert (loss.held_out_dense, loss.levels[0].held_out_score) == (0.52, 0.55)
    assert loss.held_out_floor == pytest.approx(0.62)
    assert loss.decline == pytest.approx(negative.decline) == pytest.approx(0.03)
    assert loss.search_score == -0.97
    assert loss.winner == loss.levels[0]
    # errors, p-values and verdicts have no sign
    for ours, others in zip(loss.levels, negative.levels, strict=True):
        assert (ours.error, ours.p_value, ours.held) == (others.error, others.p_value, others.held)
        assert repr(ours.held_out_error) == repr(others.held_out_error)


def test_a_level_that_was_not_confirmed_stays_so_in_other_units():
    loss = REPORT.in_metric("val_loss", "min")
    assert loss.held_out_dense is None
    assert [(level.held_out_score, level.held) for level in loss.levels] == [(None, None)] * 4


def test_a_metric_to_be_maximised_only_gets_its_name():
    assert_same(REPORT.in_metric("top5", "max"), replace(REPORT, monitor="top5"))


@pytest.mark.parametrize(
    "report",
    [
        REPORT,
        DENSE,
        REPORT.in_metric("val_loss", "min"),
        CONFIRMED,
        CONFIRMED.in_metric("val_loss", "min"),
        replace(CONFIRMED, held_out_dense=math.nan, confidence=None, method=None, samples=None),
        replace(REPORT, undivided_because="loader 0 gives 3 batches"),
        replace(CONFIRMED, levels=(replace(HELD, held_out_score=math.nan, held_out_error=math.inf, p_value=math.nan),)),
        replace(REPORT, stop_reason=None),
        replace(REPORT, score=0.9615, trained_score=0.97),
        replace(REPORT, tolerance=math.inf),
        replace(REPORT, dense_score=math.nan, levels=()),
        replace(REPORT, dense_score=-math.inf),
        replace(
            REPORT, levels=(replace(LEVELS[0], candidates=(Candidate(0, 0.2, 1.0, math.nan, -math.inf, same_as=3),)),)
        ),
        replace(REPORT, score=math.nan, trained_score=math.inf),
    ],
)
def test_a_report_survives_json(report):
    assert_same(through_json(report), report)
    assert_same(SearchReport.from_dict(report.to_dict()), report)
    assert str(through_json(report)) == str(report)


@pytest.mark.parametrize("method", Method)
def test_every_method_survives_json_and_is_a_sentence(method):
    report = replace(CONFIRMED, method=method)
    assert report.to_dict()["method"] == method.name
    assert through_json(report).method is method
    assert f"With confidence 0.95 the pruned network's true decline is at most 0.005. {method.value}" in str(report)


@pytest.mark.parametrize("reason", StopReason)
def test_every_stop_reason_survives_json_and_is_a_sentence(reason):
    report = replace(REPORT, stop_reason=reason, levels=(*LEVELS, LEVELS[3]))
    assert through_json(report).stop_reason is reason
    assert reason.value.startswith("Stopped: ")
    assert reason.value.endswith(".")
    assert reason.value.replace("`patience`", "2") in str(report)


def test_a_dict_holds_only_what_json_knows():
    def check(value) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(part)

    check(CONFIRMED.to_dict())
    fields = REPORT.to_dict()
    check(fields)
    assert fields["stop_reason"] == "DECLINED"
    assert fields["levels"][1]["candidates"][0] == {
        "index": 0,
        "sparsity": 0.36,
        "score": "nan",
        "rank": "nan",
        "tiebreak": 0.0,
        "folds": 1,
        "same_as": None,
        "refitted": False,
    }


TABLE = """\
7,200 of 10,000 prunable weights kept (72.00%): sparsity 28.00%, level 2 of 2 accepted levels.
val_acc: dense 0.965, floor 0.96, pruned 0.962 (all validation data).
No validation data was held out: the same data chose and judged the pruned network.
Stopped: a level missed the floor. Work: as much as 13 full validations, 4.2 s.

level  pruning rate  sparsity  weights left  score  s.e.  branch min  median    max  accepted  held-out  s.e.  held
    1           0.2    20.00%         8,000   0.97     -        0.93    0.95   0.97       yes         -     -     -
    2           0.2    36.00%         6,400    nan     -         nan     nan    nan        no         -     -     -
    2           0.1    28.00%         7,200  0.962     -         0.3     0.5  0.962       yes         -     -     -
    3           0.1    35.20%         6,480    0.2     -         0.1    0.15    0.2        no         -     -     -"""


def test_the_report_reads_as_a_table():
    assert str(REPORT).splitlines() == TABLE.splitlines()


def test_a_confirmed_report_reads_as_a_table():
    lines = str(CONFIRMED).splitlines()
    assert lines[:4] == [
        "8,000 of 10,000 prunable weights kept (80.00%): sparsity 20.00%, level 1 of 2 accepted levels.",
        "val_acc: dense 0.965, floor 0.96, pruned 0.97 (search half).",
        "On the held-out half of the validation data: dense 0.9523, pruned 0.9511 (s.e. 0.0021); estimated decline "
        "0.005.",
        f"With confidence 0.95 the pruned network's true decline is at most 0.005. {Method.BETTING.value}",
    ]
    assert "as much as 7.125 full validations" in lines[4]
    table = [line.split() for line in lines[6:]]
    assert [row[-4:] for row in table] == [
        ["accepted", "held-out", "s.e.", "held"],
        ["yes", "0.9511", "0.0021", "yes"],
        ["no", "-", "-", "-"],
        ["yes", "0.94", "-", "no"],
        ["no", "-", "-", "-"],
    ]
    assert [row[5] for row in table[1:]] == ["0.002", "-", "0.003", "-"]


GRADUAL = replace(
    CONFIRMED,
    gradual=True,
    levels=(replace(HELD, epoch=3), replace(MISSED, epoch=4)),
    stop_reason=StopReason.TRAINING_ENDED,
)


@pytest.mark.parametrize("branches", [1, 3])
def test_a_report_of_cuts_between_epochs_reads_as_a_table(branches):
    sizes, scores, ended, _, *table = str(replace(GRADUAL, branches=branches, score=0.955)).splitlines()
    assert sizes.endswith("level 1 of 2 pruned levels.")
    assert scores == (
        "val_acc on the held-out half of the validation data, after further training: dense 0.9523, floor 0.9473, "
        "pruned 0.9511, 0.955 after loading (all validation data)."
    )
    assert ended.startswith("Stopped: training ended.")
    branch = ["s.e.", "0.002", "0.003"], ["branch", "min", "0.93", "0.3"]
    assert [row.split()[:2] for row in table] == [["level", "epoch"], ["1", "3"], ["2", "4"]]
    assert [row.split()[-2:] for row in table] == [["judged", "held"], ["0.9511", "yes"], ["0.94", "no"]]
    assert ("s.e." in table[0], "branch min" in table[0]) == (branches > 1,) * 2
    assert all((value in row) == (branches > 1) for value, row in zip(branch[0][1:], table[1:], strict=True))


NOTHING_HELD = replace(CONFIRMED, levels=(replace(HELD, held=False),))
REFITTED = replace(REPORT, importance="sensitivity", refit="survivors by least squares")
UNDONE = replace(
    LEVELS[2], undone={"b": "it did not improve held-out inputs", "c": "it did not improve held-out inputs"}
)


@pytest.mark.parametrize(
    ("report", "said", "unsaid"),
    [
        (NOTHING_HELD, "No level could be certified with confidence 0.95: the network stays dense.", "With confidence"),
        (NOTHING_HELD, "level 0 of 1 accepted levels.", "level 1"),
        (replace(CONFIRMED, confidence=None, method=None), "pruned 0.9511 (s.e. 0.0021)", "confidence"),
        (
            replace(REPORT, undivided_because="loader 0 gives 3 samples, fewer than 16"),
            "No validation data was held out (loader 0 gives 3 samples, fewer than 16): the same data chose",
            "half",
        ),
        (replace(REPORT, score=0.9613), "pruned 0.962 (all validation data), 0.9613 after loading (all", "followed"),
        (replace(REPORT, trained_score=0.9702), "val_acc after the training that followed: 0.9702.", "loading"),
        (
            replace(CONFIRMED, trained_score=0.97),
            "the pruned network's true decline before the training that followed is at most 0.005.",
            "loading",
        ),
        (replace(REPORT, stop_reason=None), "The search is running. Work: as much as 13 full", "Stopped"),
        (replace(REPORT, importance="magnitude"), "7,200 of", "Importance"),
        (REFITTED, "Importance: sensitivity. Refit: survivors by least squares.", "not"),
        (
            replace(REFITTED, left_alone={"a": "refit not supported for LSTM"}),
            "least squares. Not refitted: a (refit not supported for LSTM).",
            "not kept",
        ),
        (
            replace(REFITTED, levels=(UNDONE,)),
            "least squares. Refit not kept for b, c: it did not improve held-out inputs.",
            "Not refitted",
        ),
    ],
)
def test_what_a_report_says_and_does_not_say(report, said, unsaid):
    words = " ".join(report.summary())
    assert said in words
    assert unsaid not in words


def test_the_markdown_holds_the_summary_and_one_row_a_level():
    *sentences, table = REPORT.markdown().split("\n\n")
    assert sentences == REPORT.summary()
    head, rule, *rows = table.splitlines()
    assert head == (
        "| level | pruning rate | sparsity | weights left | score | s.e. | branch min | median | max | accepted "
        "| held-out | s.e. | held |"
    )
    assert rule == "|" + " ---: |" * 13
    assert len(rows) == 4
    assert rows[2] == "| 2 | 0.1 | 28.00% | 7,200 | 0.962 | - | 0.3 | 0.5 | 0.962 | yes | - | - | - |"


@pytest.mark.parametrize(
    ("record", "field"), [(REPORT, "dense_score"), (LEVELS[0], "accepted"), (LEVELS[0].candidates[0], "score")]
)
def test_records_are_frozen(record, field):
    with pytest.raises(FrozenInstanceError):
        setattr(record, field, 1.0)
