"""Importance by inputs: how much a layer's outputs change without a weight, from Gram sums of its inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_roulette.mask.mask import Mask
from lightning_roulette.network.layers import Layer
from lightning_roulette.refit.gram import GramSums, LayerSums
from lightning_roulette.refit.matrices import kept_in_matrix
from lightning_roulette.refit.solvers.cholesky import inverse_diagonals


def input_scales(kind: str, sums: Mapping[Layer, LayerSums], mask: Mask, damping: float) -> dict[str, Tensor]:
    """Return the factors that multiply the magnitudes; for the kinds see `Calibration.scales`.

    Raises:
        ValueError: If a layer's inputs or outputs are not finite.
    """
    found = {name: torch.empty(kept.shape, dtype=torch.float64, device=kept.device) for name, kept in mask.items()}
    for layer, layer_sums in sums.items():
        if not layer_sums.finite:
            raise ValueError(
                f"importance is {kind!r}, but some inputs of {layer.names[0]!r} are not finite. Check that the network "
                "gives finite outputs on the calibration inputs."
            )
        kept = kept_in_matrix(layer, mask)
        if kind == "activation":
            scales = _activation(layer_sums.fit, kept)
        else:
            scales = _obs(layer_sums.fit, kept, damping, layer.bias is not None)
        layer.write(found, scales)
        if layer.bias in found:
            found[layer.bias][layer.offsets] = scales[..., -1].flatten()
    return found


def _activation(sums: GramSums, kept: Tensor) -> Tensor:
    """Return the root mean square of each input, shape `(groups, outputs, inputs)`."""
    return (sums.gram.diagonal(dim1=1, dim2=2) / sums.rows).sqrt().unsqueeze(1).expand_as(kept)


def _obs(sums: GramSums, kept: Tensor, damping: float, bias: bool) -> Tensor:
    """Return the root of the error's growth as a share of the outputs' variance; zero for zero inputs."""
    diagonals = inverse_diagonals(sums.gram / sums.rows, kept, damping)
    scales = (diagonals * sums.output_variance(centred=bias)).rsqrt()
    return torch.where(sums.gram.diagonal(dim1=1, dim2=2).unsqueeze(1) > 0, scales, 0.0)
