"""Processes that share the work of a calculation, and how they agree."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

_SUMMED_ENTRIES = 1 << 22  # entries of a tensor that are summed at a time

_Part = TypeVar("_Part")


class FailedElsewhere(RuntimeError):
    """Another process failed."""


class OutOfStep(RuntimeError):
    """This process failed in a run that all processes make in step. The others cannot be told, as they wait inside it.

    If they wait for ever, what started the processes ends them.
    """


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, eq=False)
class Processes:
    """Processes that each do a share of the same work. By default there is one.

    All processes must call the same methods in the same order. If one of them fails inside `failing_together`, the
    next call of the others raises.

    Attributes:
        rank: Number of this process.
        ranks: Number of processes.
        total: Returns the sum of a tensor over all processes. The tensor may be overwritten.
    """

    rank: int = 0
    ranks: int = 1
    total: Callable[[Tensor], Tensor] = _unchanged

    def share(self, parts: Sequence[_Part]) -> list[_Part]:
        """The parts that this process works on: every one in `ranks`."""
        return list(parts[self.rank :: self.ranks])

    def number(self, own: int) -> int:
        """The number among all parts of a part with this number in the share."""
        return self.rank + own * self.ranks

    def own(self, number: int) -> int | None:
        """The number in the share of a part with this number among all parts; None if another process has it."""
        own, rank = divmod(number, self.ranks)
        return own if rank == self.rank else None

    def add(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The sums of tensors over all processes.

        Args:
            tensors: Of the same shapes and types in all processes. They may be overwritten.

        Raises:
            FailedElsewhere: If another process failed.
        """
        if self.ranks > 1:
            self._join(0)
            return tuple(self._sum(one) for one in tensors)
        return tensors

    def go_on(self) -> None:
        """Wait for the other processes.

        Raises:
            FailedElsewhere: If one of them failed.
        """
        self.add()

    def each(self, values: Tensor) -> Tensor:
        """The values of every process, by process number: shape `(ranks, *values.shape)`."""
        table = values.new_zeros(self.ranks, *values.shape)
        table[self.rank] = values
        return self.add(table)[0]

    def first(self, flags: Tensor) -> Tensor:
        """The bools of the first process."""
        return self.add(flags.to(torch.uint8) if self.rank == 0 else torch.zeros_like(flags, dtype=torch.uint8))[0] > 0

    def first_text(self, text: str) -> str:
        """The text of the first process whose text is not empty."""
        if self.ranks == 1:
            return text
        letters = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = self.each(torch.tensor(len(letters)))
        speaker = int((sizes > 0).to(torch.uint8).argmax())
        if not sizes[speaker]:
            return ""
        heard = letters if self.rank == speaker else letters.new_zeros(int(sizes[speaker]))
        return bytes(self.add(heard)[0].tolist()).decode()

    def anywhere(self, here: bool) -> bool:
        """Whether `here` is True in at least one process."""
        return bool(self.add(torch.tensor(int(here)))[0] > 0)

    def any_of(self, parts: Sequence[_Part], here: Container[_Part]) -> set[_Part]:
        """Those parts that are among `here` in at least one process.

        Args:
            parts: As many in all processes.
            here: Some of them.
        """
        if not parts:
            return set()
        (counts,) = self.add(torch.tensor([int(part in here) for part in parts]))
        return {part for part, count in zip(parts, counts.tolist(), strict=True) if count}

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let the other processes fail if this one fails inside the block, and the other way round.

        Raises:
            FailedElsewhere: If another process failed.
        """
        try:
            yield
        except (FailedElsewhere, OutOfStep):
            raise
        except Exception:
            if self.ranks > 1:
                self.total(torch.tensor(1))
            raise
        if self.ranks > 1:
            self._join(0)

    def _join(self, failures: int) -> None:
        if int(self.total(torch.tensor(failures))):
            raise FailedElsewhere("another process failed in the same calculation. Its error says why.")

    def _sum(self, tensor: Tensor) -> Tensor:
        """Return the sum. A large tensor is summed in place and in parts, so that no second one is needed."""
        if tensor.numel() <= _SUMMED_ENTRIES:
            return self.total(tensor)
        flat = tensor.contiguous().view(-1)
        for part in flat.split(_SUMMED_ENTRIES):
            part.copy_(self.total(part))
        return flat.view(tensor.shape)


ONE_PROCESS = Processes()
