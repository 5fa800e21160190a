"""How processes agree: sums, texts, and failures."""

from __future__ import annotations

import pytest
import torch

from lightning_roulette.large import processes as module
from lightning_roulette.large.processes import ONE_PROCESS, FailedElsewhere, Processes
from tests.support.together import together


def each_of(ranks, work):
    """What `work` returns or raises in each process."""
    return together(ranks, lambda rank, add: work(Processes(rank, ranks, add)))


def test_sums_are_those_of_all_processes_and_keep_shape_and_type():
    def work(of):
        whole, half = torch.full((2, 3), of.rank + 1), torch.ones(2, dtype=torch.float64) / 2
        return of.add(whole, half)

    for whole, half in each_of(3, work):
        assert torch.equal(whole, torch.full((2, 3), 6))
        assert torch.equal(half, torch.full((2,), 1.5, dtype=torch.float64))


def test_a_large_tensor_is_summed_in_parts(monkeypatch):
    monkeypatch.setattr(module, "_SUMMED_ENTRIES", 4)
    one = torch.arange(30.0).view(5, 6).mT
    sizes = []

    def work(rank, add):
        return Processes(rank, 2, lambda tensor: sizes.append(tensor.numel()) or add(tensor)).add(one.clone())[0]

    for found in together(2, work):
        assert torch.equal(found, 2 * one)
    assert max(sizes) == 4


def test_shares_have_every_part_once_and_know_its_number():
    shares = [Processes(rank, 3).share("abcdefgh") for rank in range(3)]
    assert shares == [["a", "d", "g"], ["b", "e", "h"], ["c", "f"]]
    assert ["abcdefgh"[Processes(1, 3).number(own)] for own in range(3)] == shares[1]


@pytest.mark.parametrize("texts", [("", "", ""), ("", "two ä", "three"), ("one", "", "three"), ("", "", "last")])
def test_the_first_text_that_is_not_empty_is_heard_by_all(texts):
    expected = next((text for text in texts if text), "")
    assert each_of(3, lambda of: of.first_text(texts[of.rank])) == [expected] * 3


def test_flags_and_parts_are_agreed():
    flags = torch.tensor([[True, False], [False, True]])
    for found in each_of(2, lambda of: of.first(flags if of.rank == 0 else ~flags)):
        assert torch.equal(found, flags)
    assert each_of(2, lambda of: of.anywhere(of.rank == 1)) == [True, True]
    assert each_of(2, lambda of: of.anywhere(False)) == [False, False]
    assert each_of(2, lambda of: of.any_of("abc", "abc"[of.rank : of.rank + 1])) == [{"a", "b"}] * 2
    assert each_of(2, lambda of: of.any_of([], [])) == [set()] * 2


def test_one_process_agrees_with_itself():
    one = torch.ones(2)
    assert ONE_PROCESS.add(one)[0] is one
    assert ONE_PROCESS.first_text("a") == "a"
    assert torch.equal(ONE_PROCESS.first(one > 0), one > 0)
    with pytest.raises(LookupError), ONE_PROCESS.failing_together():
        raise LookupError


@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_a_failure_of_one_process_is_raised_by_all_instead_of_a_wait(place):
    def work(of):
        with of.failing_together():
            for now in ("before", "between", "after"):
                if of.rank == 1 and now == place:
                    raise LookupError("mine")
                if now != "after":
                    of.add(torch.ones(2))

    first, second, third = each_of(3, work)
    assert [type(one) for one in (first, second, third)] == [FailedElsewhere, LookupError, FailedElsewhere]


def test_processes_that_fail_together_each_raise_their_own_error():
    def work(of):
        with of.failing_together():
            raise LookupError(of.rank)

    assert [one.args for one in each_of(2, work)] == [(0,), (1,)]
