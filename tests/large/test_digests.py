"""A digest changes with every bit of a tensor, and with nothing else."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_roulette.large.digests import digest_of, digests_of

ROW = 1 << 16


def sparse(dense: torch.Tensor, layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")
        return dense.to_sparse(layout=layout)


KINDS = {
    "float32": torch.randn(5, 7),
    "float64": torch.randn(3, dtype=torch.float64),
    "bfloat16": torch.randn(9).bfloat16(),
    "float8": torch.randn(9).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False, True]),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "int64": torch.arange(4),
    "complex64": torch.randn(3, dtype=torch.complex64),
    "complex128": torch.randn(3, dtype=torch.complex128),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "scalar": torch.tensor(2.5),
    "strided": torch.randn(6, 8)[::2, 1::3],
    "transposed": torch.randn(6, 8).t(),
    "expanded": torch.randn(1, 5).expand(4, 5),
    "odd offset": torch.arange(9, dtype=torch.uint8)[3:],
    "several rows": torch.randn(2 * ROW + 3),
    "several rows, transposed": torch.randn(3, ROW + 5).t(),
    "several rows, halves": torch.randn(ROW, 5).half().t(),
    "sparse": sparse(torch.eye(4), torch.sparse_coo),
    "csr": sparse(torch.eye(4), torch.sparse_csr),
    "csc": sparse(torch.eye(4), torch.sparse_csc),
    "parameter": torch.nn.Parameter(torch.randn(3)),
}


def changed(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor but for one entry."""
    if tensor.layout != torch.strided:
        return sparse(changed(tensor.detach().to_dense()), tensor.layout)
    other = tensor.detach().clone(memory_format=torch.contiguous_format)
    last = other.view(-1)[-1:].view(torch.uint8)
    last[0] ^= 1
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tensors_have_equal_digests_and_a_changed_bit_is_found(kind):
    tensor = KINDS[kind]
    copy = tensor.detach().clone()
    strided = tensor.layout == torch.strided
    assert digest_of(copy.contiguous() if strided else copy) == digest_of(tensor)
    assert digest_of(changed(tensor)) != digest_of(tensor)


def test_a_nested_tensor_is_read():
    def nested(last):
        return torch.nested.nested_tensor([torch.ones(2), torch.tensor([1.0, 2.0, last])], layout=torch.jagged)

    assert digest_of(nested(3.0)) == digest_of(nested(3.0)) != digest_of(nested(4.0))


def test_a_nan_equals_itself():
    tensor = torch.tensor([float("nan"), 1.0])
    assert digest_of(tensor) == digest_of(tensor.clone())


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(6),
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(6).half(),
        torch.zeros(0),
        torch.zeros(0, 4),
        torch.zeros(()),
    ],
)
def test_shape_and_dtype_count(other):
    assert digest_of(other) != digest_of(torch.zeros(7))


@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.data())
def test_permutations_negations_and_moved_entries_are_found(numbers, data):
    tensor = torch.tensor(numbers)
    others = [
        tensor[torch.tensor(data.draw(st.permutations(range(len(numbers)))))],
        torch.where(torch.tensor([data.draw(st.booleans()) for _ in numbers]), -tensor, tensor),
        tensor.roll(1),
    ]
    for other in others:
        same = torch.equal(other.view(torch.int32), tensor.view(torch.int32))
        assert (digest_of(other) == digest_of(tensor)) == same


def test_the_order_of_rows_counts():
    rows = torch.randn(3, ROW)
    assert digest_of(rows) != digest_of(rows[[1, 0, 2]])
    assert digest_of(rows) != digest_of(-rows)


def test_several_digests_are_those_of_each():
    tensors = list(KINDS.values())
    assert digests_of(tensors) == [digest_of(one) for one in tensors]
    assert digests_of([]) == []


def test_the_memory_is_a_small_buffer():
    from torch.profiler import ProfilerActivity, profile

    for tensor in (torch.zeros(1 << 21), torch.zeros(1 << 10, 1 << 11).t(), torch.zeros(1 << 21)[1:]):
        digest_of(tensor)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            digest_of(tensor)
        largest = max(event.cpu_memory_usage for event in found.events())
        assert largest <= 8 * ROW
