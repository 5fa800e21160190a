"""Matrices of layers: copies of the weights, and written back into them in their own layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_roulette.network.refittable import layers_of
from lightning_roulette.refit import matrices
from lightning_roulette.refit.matrices import RowSampler, kept_in_matrix, matrix_of, write_matrix
from lightning_roulette.refit.traversal import Call, Step


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = 2, nn.Parameter(torch.arange(6.0).view(3, 2)), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", [nn.Linear(3, 2, bias=False), Conv1D()], ids=["Linear", "Conv1D"])
def test_a_matrix_keeps_its_values_while_the_weight_is_written(part, dtype):
    nn.init.zeros_(part.to(dtype).weight)
    ((layer,), _) = layers_of(part, ["weight"])
    tensors = dict(part.named_parameters())
    before = matrix_of(layer, tensors)
    assert before.shape == (1, 2, 3)
    written = torch.arange(6.0, dtype=torch.float64).view(1, 2, 3) + 10
    write_matrix(layer, tensors, written)
    assert not before.any()
    assert torch.equal(matrix_of(layer, tensors), written)
    assert torch.equal((part.weight.mT if isinstance(part, Conv1D) else part.weight).double(), written[0])


def test_the_mask_of_a_transposed_weight_is_transposed():
    ((layer,), _) = layers_of(Conv1D(), ["weight"])
    kept = torch.tensor([[True, False], [False, False], [True, True]])
    assert torch.equal(kept_in_matrix(layer, {"weight": kept}), kept.T.unsqueeze(0))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_matrix_of_a_transposed_convolution_has_its_outputs_first(groups):
    part = nn.ConvTranspose2d(4, 6, (3, 2), groups=groups)
    ((layer,), _), tensors = layers_of(part, ["weight"]), dict(part.named_parameters())
    matrix = matrix_of(layer, tensors)
    assert matrix.shape == (groups, 6 // groups, 4 // groups * 6 + 1)
    assert matrix[0, 1, 6 + 2] == part.weight[1, 1, 1, 0].double()
    before = part.weight.clone()
    write_matrix(layer, tensors, matrix + 1)
    assert torch.equal(part.weight, (before.double() + 1).float())
    assert torch.equal(kept_in_matrix(layer, {"weight": before > 0})[..., :-1], matrix[..., :-1] > 0)


STEP = Step(nn.Identity())


def chosen(layer, sampler: RowSampler, count: int, batch: int = 0) -> list[int]:
    """The rows of `count` that are chosen."""
    given = torch.arange(count).float().view(-1, 1).expand(-1, layer.module.in_features)
    return sampler.rows(layer, Call(STEP, batch, 0), ((given,), {})).values[0, :, 0].long().tolist()


def linear(inputs: int):
    ((layer,), _) = layers_of(nn.Linear(inputs, 2, bias=False), ["weight"])
    return layer


@pytest.mark.parametrize(
    ("inputs", "batches", "rows"),
    [(1, 1, 4096), (128, 1, 4096), (129, 1, 4128), (140, 4, 1120), (2, 4, 1024), (400, 1, 5000), (1, 1000, 8)],
)
def test_rows_are_thirty_two_for_each_input_within_bounds(inputs, batches, rows, monkeypatch):
    monkeypatch.setattr(matrices, "_MOST_ROWS", 5000)
    layer = linear(inputs)
    for count in (rows - 1, rows, rows + 1, 3 * rows):
        assert len(chosen(layer, RowSampler(None, batches, 0), count)) == min(count, rows)


@pytest.mark.parametrize("count", [20, 21, 39, 40, 57, 1000])
def test_one_row_of_each_of_equal_parts_is_chosen(count):
    layer, sampler = linear(3), RowSampler(20, 1, 0)
    found = chosen(layer, sampler, count)
    assert all(part * count // 20 <= row < (part + 1) * count // 20 for part, row in enumerate(found))
    assert found == chosen(layer, sampler, count)
    if count > 40:
        assert found != chosen(layer, RowSampler(20, 1, 1), count)
        assert found != chosen(layer, sampler, count, batch=1)


def test_every_row_of_a_part_is_chosen_as_often():
    layer = linear(3)
    found = torch.tensor([chosen(layer, RowSampler(8, 1, seed), 20) for seed in range(400)])
    often = torch.bincount(found.flatten(), minlength=20) / 400
    sizes = [2, 3] * 4
    assert (often - torch.tensor([1 / size for size in sizes for _ in range(size)])).abs().max() < 0.1
