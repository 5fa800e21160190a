"""Reports survive JSON, and dictionaries of earlier versions are read."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from lightning_roulette import Candidate, Method, SearchReport, StopReason
from lightning_roulette.report.records import Footprint
from tests.support.reports import CONFIRMED, DENSE, HELD, LEVELS, REPORT

COPY = Candidate(0, 0.2, 1.0, math.nan, -math.inf, same_as=3)


def through_json(report: SearchReport) -> SearchReport:
    return SearchReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))


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
        replace(REPORT, footprint=Footprint(40_000, 9_000, 10_000, 7_200)),
        replace(REPORT, footprint=Footprint(40_000)),
        replace(REPORT, target_sparsity=0.9, dense_measured=math.nan),
        replace(REPORT, score=0.9615, trained_score=0.97),
        replace(REPORT, tolerance=math.inf),
        replace(REPORT, dense_score=math.nan, levels=()),
        replace(REPORT, dense_score=-math.inf),
        replace(REPORT, levels=(replace(LEVELS[0], candidates=(COPY,)),)),
        replace(REPORT, score=math.nan, trained_score=math.inf),
        *(replace(CONFIRMED, method=method) for method in Method),
        *(replace(REPORT, stop_reason=reason) for reason in StopReason),
    ],
)
def test_a_report_survives_json(report):
    # the text of a NaN is equal to itself, a NaN is not; a tuple differs from a list, and inf from "inf"
    assert repr(through_json(report)) == repr(SearchReport.from_dict(report.to_dict())) == repr(report)
    assert str(through_json(report)) == str(report)


def test_a_dictionary_holds_only_types_that_json_has():
    def check(value) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(part)

    check(CONFIRMED.to_dict())
    fields = REPORT.to_dict()
    check(fields)
    assert (fields["stop_reason"], CONFIRMED.to_dict()["method"]) == ("DECLINED", "BETTING")
    expected = {"index": 0, "sparsity": 0.36, "score": "nan", "rank": "nan", "tiebreak": 0.0, "folds": 1}
    assert fields["levels"][1]["candidates"][0] == expected | {"same_as": None, "refitted": False}


def test_names_of_earlier_versions_are_read():
    former = {"held_out_score": "gated", "held_out_error": "gated_error"}
    fields = CONFIRMED.to_dict()
    fields["gated_dense"] = fields.pop("held_out_dense")
    fields["shared"] = fields.pop("undivided_because")
    fields["levels"] = [{former.get(name, name): one for name, one in level.items()} for level in fields["levels"]]
    assert {"gated", "gated_error"} <= fields["levels"][0].keys()
    assert SearchReport.from_dict(json.loads(json.dumps(fields))).to_dict() == CONFIRMED.to_dict()


def test_reports_from_before_there_were_refits_are_read():
    fields = REPORT.to_dict()
    for record, names in [
        (fields, ("refit", "left_alone")),
        *((level, ("undone",)) for level in fields["levels"]),
        *((candidate, ("refitted",)) for level in fields["levels"] for candidate in level["candidates"]),
    ]:
        for name in names:
            del record[name]
    assert repr(SearchReport.from_dict(fields)) == repr(REPORT)
