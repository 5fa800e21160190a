"""Lending a network's weights: they may change inside a block and have their old values after it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import UninitializedParameter

from lightning_roulette.large.bits import Flags, is_small
from lightning_roulette.large.gathered import write_rows
from lightning_roulette.large.masking import RemovedValues, fill
from lightning_roulette.large.shards import is_sharded, local
from lightning_roulette.mask.mask import flags_of


class InUse(Mapping[str, Tensor]):
    """The parameters and buffers of a network as its modules have them now. In a forward, FSDP2 makes them whole.

    Args:
        module: The network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getitem__(self, name: str) -> Tensor:
        path, _, own = name.rpartition(".")
        found: Tensor = getattr(self._module.get_submodule(path), own)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(named_tensors(self._module))

    def __len__(self) -> int:
        return len(named_tensors(self._module))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a network by name. A tied parameter is listed under all its names."""
    return {**dict(module.named_buffers()), **dict(module.named_parameters(remove_duplicate=False))}


@contextmanager
def lent(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Write the old values back into tensors at the end of the block.

    Yields:
        Copies of the old values.
    """
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield before
    finally:
        surely(lambda: copy_into(tensors, before))
        torch.clear_autocast_cache()  # it may hold casts of the other values


@contextmanager
def applied(mask: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Set the pruned weights to zero inside the block, in place. After it, all weights have their old values.

    Args:
        mask: The mask.
        weights: Name to tensor, at least those that the mask names.
    """
    # all are set aside before the first is filled, as two names may have one tensor
    aside = [_set_aside(weights[name].detach(), flags) for name, flags in flags_of(mask).items()]

    def give_back() -> None:
        for one in aside:
            one.give_back()

    try:
        for one in aside:
            one.fill()
        torch.clear_autocast_cache()  # it may hold casts of the old values
        yield
    finally:
        surely(give_back)
        torch.clear_autocast_cache()


def copy_into(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into the tensors of the same names, in place."""
    for name, value in values.items():
        write(tensors[name], value)


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Write a value into a tensor, in place. Entries of an expanded tensor that share memory are written once.

    A sharded tensor takes a whole value, too, of which this process writes its rows. A tensor that was made in
    inference mode, such as a buffer of `trainer.validate`, is written in inference mode: torch allows nothing else.
    """
    if is_sharded(tensor) and not is_sharded(value):
        write_rows(tensor, value)
        return
    if tensor.layout == torch.strided and 0 in tensor.stride():
        for dim, step in enumerate(tensor.stride()):
            if step == 0 and tensor.shape[dim] > 1:
                tensor, value = tensor.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    with torch.inference_mode() if tensor.is_inference() else nullcontext():
        tensor.copy_(value)


def leave_inference_mode(module: nn.Module) -> None:
    """Make the parameters of a module ordinary that were made in inference mode. They stay the same objects.

    `trainer.validate` makes the parameters of lazy layers so, and neither training nor a refit could write them.
    """
    for parameter in module.parameters():
        if not isinstance(parameter, UninitializedParameter) and parameter.is_inference():
            parameter.data = parameter.data.clone()


def surely(action: Callable[[], None]) -> None:
    """Run `action` to its end even if Ctrl-C interrupts it.

    Args:
        action: May be run twice.
    """
    try:
        action()
    except KeyboardInterrupt:
        action()
        raise


class _WholeValues:
    """All values of a small weight, set aside. This is faster than setting aside the removed values only."""

    def __init__(self, weight: Tensor, kept: Flags) -> None:
        self._weight, self._kept = weight, kept
        self._values = local(weight).clone()

    def fill(self) -> None:
        """Write zero wherever the weight is pruned."""
        fill(self._weight, self._kept)

    def give_back(self) -> None:
        """Write the values back."""
        local(self._weight).copy_(self._values)


def _set_aside(weight: Tensor, kept: Flags) -> _WholeValues | RemovedValues:
    return _WholeValues(weight, kept) if is_small(kept) else RemovedValues(weight, kept)
