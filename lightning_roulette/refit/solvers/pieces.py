"""What is chosen as a whole in a layer, and what it competes with: single weights, neighbours, or blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Pieces(ABC):
    """The entries of a layer's matrices in pieces that stay or leave as a whole, and the pieces in sets.

    Each set keeps its own number of pieces. Sets and pieces are the last two dimensions of what the methods return.
    """

    @abstractmethod
    def sizes(self, values: Tensor) -> Tensor:
        """Return the root of the sum of squares of each piece.

        Args:
            values: One number at least 0 for each entry, shape `(groups, outputs, inputs)`.
        """

    @abstractmethod
    def whole(self, flags: Tensor) -> Tensor:
        """Return which pieces have True for all of their entries.

        Args:
            flags: Bool, shape `(groups, outputs, inputs)`.
        """

    @abstractmethod
    def entries(self, pieces: Tensor, like: Tensor) -> Tensor:
        """Return the entries of some pieces; False for entries that are in no piece.

        Args:
            pieces: Bool, in the shape that `whole` returns.
            like: A tensor of shape `(groups, outputs, inputs)`.
        """

    @property
    def by_output(self) -> bool:
        """Whether no piece and no set has entries of several outputs."""
        return True


@dataclass(frozen=True)
class Singly(Pieces):
    """Each entry is a piece. A set is an output."""

    def sizes(self, values: Tensor) -> Tensor:
        """See `Pieces`."""
        return values.unsqueeze(2)

    def whole(self, flags: Tensor) -> Tensor:
        """See `Pieces`."""
        return flags.unsqueeze(2)

    def entries(self, pieces: Tensor, like: Tensor) -> Tensor:
        """See `Pieces`."""
        return pieces.squeeze(2)


@dataclass(frozen=True, eq=False)
class Segments(Pieces):
    """Each entry is a piece. A set is a segment of the inputs of an output, such as four neighbours.

    Attributes:
        inputs: int64, shape `(segments, size)`: the inputs of each segment. An input is in one segment at most.
    """

    inputs: Tensor

    def sizes(self, values: Tensor) -> Tensor:
        """See `Pieces`."""
        return values[..., self.inputs]

    def whole(self, flags: Tensor) -> Tensor:
        """See `Pieces`."""
        return flags[..., self.inputs]

    def entries(self, pieces: Tensor, like: Tensor) -> Tensor:
        """See `Pieces`."""
        found = torch.zeros_like(like, dtype=torch.bool)
        found[..., self.inputs.flatten()] = pieces.flatten(2)
        return found


@dataclass(frozen=True, eq=False)
class Blocks(Pieces):
    """A piece is a block of entries. A set has the blocks of one weight and size that begin at one output of a group.

    Attributes:
        labels: int64, shape `(groups, outputs, inputs)`: the number of the block of each entry, from 0 to the number of
            blocks; -1 for entries in no block.
        sets: int64, shape `(sets, most)`: the blocks of each set, padded with -1.
    """

    labels: Tensor
    sets: Tensor

    @classmethod
    def of(cls, labels: Tensor, ends: Sequence[int] = ()) -> Blocks:
        """Return the blocks of a layer.

        Args:
            labels: See `labels`, but for any numbers of at least 0.
            ends: The number after the last block of each weight, in rising order. A recurrent layer has two weights.
        """
        numbers, labels = labels.unique(return_inverse=True)
        labels = labels - int(numbers[0] < 0)
        weight = torch.bucketize(numbers[numbers >= 0], torch.tensor(ends, device=labels.device), right=True)
        count = int(labels.max()) + 1
        flat = torch.where(labels < 0, count, labels).flatten()
        rows = torch.arange(labels.shape[0] * labels.shape[1], device=labels.device)
        rows = rows.repeat_interleave(labels.shape[2])
        first = torch.full((count + 1,), len(rows), device=labels.device).scatter_reduce(0, flat, rows, "amin")
        kinds = torch.stack([first[:count], flat.bincount(minlength=count + 1)[:count], weight], 1)
        kind = kinds.unique(dim=0, return_inverse=True)[1]
        members = [(kind == one).nonzero().flatten() for one in range(int(kind.max()) + 1)]
        return cls(labels, torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1))

    def sizes(self, values: Tensor) -> Tensor:
        """See `Pieces`."""
        return self._sums(values.square()).sqrt()[self.sets]

    def whole(self, flags: Tensor) -> Tensor:
        """See `Pieces`."""
        missing = self._sums((~flags).float())
        missing[-1] = 1.0  # the padding
        return (missing == 0)[self.sets]

    def entries(self, pieces: Tensor, like: Tensor) -> Tensor:
        """See `Pieces`."""
        found = torch.zeros(int(self.labels.max()) + 2, dtype=torch.bool, device=pieces.device)
        found[self.sets[self.sets >= 0]] = pieces[self.sets >= 0]
        return found[self.labels]

    @property
    def by_output(self) -> bool:
        """See `Pieces`."""
        return False

    def _sums(self, values: Tensor) -> Tensor:
        """Return the sum over each block, with that of the label -1 as the last one."""
        sums = values.new_zeros(int(self.labels.max()) + 2)
        return sums.index_add_(0, torch.where(self.labels < 0, len(sums) - 1, self.labels).flatten(), values.flatten())
