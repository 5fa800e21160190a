"""Outcomes: what their records refuse, and how samples are drawn again."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_roulette.judge.outcomes import Batches, Resamples, Singles
from tests.support.outcomes import batches

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("record", "message"),
    [
        *(
            (lambda bounds=bounds: Singles(torch.zeros(3), *bounds), "low and high")
            for bounds in [(1, 0), (0, 0), (0, INF), (-INF, 0), (NAN, 1)]
        ),
        (lambda: Singles(torch.tensor([0.5, 1.5, 0.0]), 0, 1), r"values hold 1.5, but must lie in \[0, 1\]"),
        (lambda: Singles(torch.zeros(3, 2), 0, 1), "one dimension"),
        (lambda: Batches(torch.tensor(1.0), torch.tensor(1.0)), "one dimension"),
        (lambda: Batches(torch.zeros(3), torch.ones(2)), "weights have shape"),
        *((lambda bad=bad: batches([1.0, 1.0], [1.0, bad]), "weights hold") for bad in (0.0, -1.0, NAN, INF)),
    ],
)
def test_outcomes_that_contradict_their_description_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        record()


def test_resamples_have_the_size_of_the_data_and_repeat_samples():
    seen: list[Tensor] = []
    one = Resamples(lambda index: seen.append(index) or 0.5, 50)
    one.resampled(200)
    assert one.resampled(200) == [0.5] * 200
    assert len(seen) == 200  # each is scored once
    assert all(index.dtype == torch.int64 and index.shape == (50,) for index in seen)
    assert min(int(index.min()) for index in seen) == 0
    assert max(int(index.max()) for index in seen) == 49
    assert all(len(index.unique()) < 50 for index in seen)
    counts = torch.cat(seen).bincount(minlength=50)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001
    assert not torch.equal(seen[0], seen[1])
    again: list[Tensor] = []
    Resamples(lambda index: again.append(index) or 0.5, 50).resampled(2)
    assert torch.equal(torch.cat(again), torch.cat(seen[:2]))
