"""An entropy coder that writes, and one that reads, with the same methods.

A method that is called with values writes them; called with None, it reads. It returns the values either way. So every
model of the data is written once, and what is read is modelled as it was when it was written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_roulette.slim.files.logits import ONE, Integers

_MISSING = "compressed files need the package constriction. Run: pip install 'lightning-roulette[compress]'"


def entropy_coder() -> Any:
    """The package constriction.

    Raises:
        ImportError: If it is not installed. The message names the extra.
    """
    try:
        import constriction
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return constriction


class Coder(ABC):
    """What a model of the data is written with.

    Probabilities are whole numbers in units of 1/65536. constriction turns them into its own fixed point by one exact
    multiplication, so that they are equal on every machine.

    Attributes:
        spent: The bits that the values so far take.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        models = entropy_coder().stream.model
        self._flips, self._table, self._flat = models.Bernoulli(perfect=False), models.Categorical, models.Uniform

    def bits(self, values: npt.NDArray[Any] | None, ones: Integers) -> Integers:
        """Write or read bits.

        Args:
            values: The bits, or None to read them.
            ones: The probability of a one, for each bit.
        """
        found = self._many(values, self._flips, ones / ONE)
        self.spent -= float(np.log2(np.where(found, ones, ONE - ones) / ONE).sum())
        return found

    def symbols(self, values: npt.NDArray[Any] | None, count: int, shares: Integers) -> Integers:
        """Write or read symbols that all have the same probabilities.

        Args:
            values: The symbols, or None to read them.
            count: How many they are.
            shares: The probability of each symbol. At least two; they add up to `ONE`.
        """
        found = self._alike(values, self._table(shares / ONE, perfect=False), count)
        self.spent -= float(np.log2(shares / ONE)[found].sum())
        return found

    def number(self, value: int | None, size: int) -> int:
        """Write or read a number from 0 to `size - 1`, each as probable as the others. `size` is at least 2."""
        found = self._alike(None if value is None else np.array([value]), self._flat(size), 1)
        self.spent += float(np.log2(size))
        return int(found[0])

    def raw(self, values: npt.NDArray[np.uint64] | None, count: int, width: int) -> npt.NDArray[np.uint64]:
        """Write or read numbers of `width` bits, at most 64, as they are."""
        if width == 0 or count == 0:
            return np.zeros(count, np.uint64)
        self.spent += count * width
        return self._raw(values, count, width)

    @abstractmethod
    def _many(self, values: npt.NDArray[Any] | None, model: Any, parameters: npt.NDArray[np.float64]) -> Integers:
        """Write or read values with one parameter each."""

    @abstractmethod
    def _alike(self, values: npt.NDArray[Any] | None, model: Any, count: int) -> Integers:
        """Write or read values of one model."""

    @abstractmethod
    def _raw(self, values: npt.NDArray[np.uint64] | None, count: int, width: int) -> npt.NDArray[np.uint64]:
        """Write or read numbers as they are."""


class Writer(Coder):
    """Writes three sections: entropy-coded words, whole bytes, and single bits."""

    def __init__(self) -> None:
        super().__init__()
        self._encoder = entropy_coder().stream.queue.RangeEncoder()
        self._bytes: list[bytes] = []
        self._bits: list[npt.NDArray[np.uint8]] = []

    def sections(self) -> list[bytes]:
        """The three sections."""
        words = self._encoder.get_compressed().astype("<u4").tobytes()
        bits = np.concatenate([np.zeros(0, np.uint8), *self._bits])
        return [words, b"".join(self._bytes), np.packbits(bits).tobytes()]

    def _many(self, values: npt.NDArray[Any] | None, model: Any, parameters: npt.NDArray[np.float64]) -> Integers:
        given = _given(values)
        self._encoder.encode(given.astype(np.int32), model, parameters)
        return given

    def _alike(self, values: npt.NDArray[Any] | None, model: Any, count: int) -> Integers:
        given = _given(values)
        self._encoder.encode(given.astype(np.int32), model)
        return given

    def _raw(self, values: npt.NDArray[np.uint64] | None, count: int, width: int) -> npt.NDArray[np.uint64]:
        given = np.asarray(values, np.uint64)
        whole, rest = divmod(width, 8)
        self._bytes.append(given.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :whole].tobytes())
        for place in range(8 * whole, 8 * whole + rest):
            self._bits.append((given >> np.uint64(place)).astype(np.uint8) & np.uint8(1))
        return given


class Meter(Coder):
    """Counts the bits of what would be written, and writes nothing."""

    def _many(self, values: npt.NDArray[Any] | None, model: Any, parameters: npt.NDArray[np.float64]) -> Integers:
        return _given(values)

    def _alike(self, values: npt.NDArray[Any] | None, model: Any, count: int) -> Integers:
        return _given(values)

    def _raw(self, values: npt.NDArray[np.uint64] | None, count: int, width: int) -> npt.NDArray[np.uint64]:
        return np.asarray(values, np.uint64)


class Reader(Coder):
    """Reads the three sections of a `Writer`.

    Raises:
        EOFError: While reading, if a section is too short.
    """

    def __init__(self, sections: list[bytes]) -> None:
        super().__init__()
        words, self._bytes, self._bits = sections
        self._decoder = entropy_coder().stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
        self._byte = self._bit = 0

    @property
    def is_at_end(self) -> bool:
        """Whether everything may have been read."""
        bits = (self._bit + 7) // 8
        return self._byte == len(self._bytes) and bits == len(self._bits) and self._decoder.maybe_exhausted()

    def _many(self, values: npt.NDArray[Any] | None, model: Any, parameters: npt.NDArray[np.float64]) -> Integers:
        found: Integers = self._decoder.decode(model, parameters.reshape(-1)).astype(np.int64)
        return found

    def _alike(self, values: npt.NDArray[Any] | None, model: Any, count: int) -> Integers:
        found: Integers = self._decoder.decode(model, count).astype(np.int64)
        return found

    def _raw(self, values: npt.NDArray[np.uint64] | None, count: int, width: int) -> npt.NDArray[np.uint64]:
        whole, rest = divmod(width, 8)
        if self._byte + count * whole > len(self._bytes) or self._bit + count * rest > 8 * len(self._bits):
            raise EOFError("it is too short")
        padded = np.zeros((count, 8), np.uint8)
        part = np.frombuffer(self._bytes, np.uint8, count * whole, self._byte)
        padded[:, :whole] = part.reshape(count, whole)
        self._byte += count * whole
        found = padded.view("<u8").reshape(-1).astype(np.uint64)
        for place in range(8 * whole, 8 * whole + rest):
            found |= self._plane(count).astype(np.uint64) << np.uint64(place)
        return found

    def _plane(self, count: int) -> npt.NDArray[np.uint8]:
        first, last = self._bit // 8, (self._bit + count + 7) // 8
        bits = np.unpackbits(np.frombuffer(self._bits, np.uint8, last - first, first))
        start, self._bit = self._bit % 8, self._bit + count
        return bits[start : start + count]


def _given(values: npt.NDArray[Any] | None) -> Integers:
    if values is None:
        raise TypeError("values is None, but a writer needs values.")
    return np.asarray(values, np.int64).reshape(-1)
