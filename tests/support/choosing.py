"""A refit that chooses which weights stay, by a script: its masks do not nest."""

from __future__ import annotations

from itertools import pairwise

import torch

from lightning_roulette import Calibration, Mask
from lightning_roulette.refit.refitted import Refitted


def chosen(mask: Mask) -> Mask:
    """As many weights of each layer as a mask keeps, anywhere in the layer; always the same ones."""
    chance, kept = torch.Generator().manual_seed(int.from_bytes(mask.digest[:7], "little")), {}
    for name, given in mask.items():
        order = torch.randperm(given.numel(), generator=chance)[: mask.counts[name]]
        kept[name] = torch.zeros(given.numel(), dtype=torch.bool).index_fill(0, order, True).view(given.shape)
    return Mask(kept)


class Choosing(Calibration):
    """Keeps as many weights of each layer as it is told, but others, with 1.25 times their dense values."""

    def refit(self, mask: Mask, how="least_squares", allowed=None, **choices) -> Refitted:
        found, keeps = super().refit(mask, how, allowed, **choices), chosen(mask)
        dense = {name: self._module.get_parameter(name).detach() for name in mask}
        values = {name: 1.25 * dense[name] * kept for name, kept in keeps.items()}
        return Refitted({**found.values, **values}, found.undone, keeps)


def nests(masks: list[Mask]) -> bool:
    return all(child <= parent for parent, child in pairwise(masks))
