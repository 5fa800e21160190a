"""Matrices of layers: copies of the weights, and written back into them in their own layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_roulette.network.layers import layers_of
from lightning_roulette.refit.matrices import kept_in_matrix, matrix_of, write_matrix


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
