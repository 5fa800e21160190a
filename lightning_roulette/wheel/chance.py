"""Counter-based chance: random numbers that depend on nothing but seed, level, candidate, parameter and index.

There is no generator and no state. The 64 random bits of a weight are

    bits(weight) = mix(stream + (index + 1) * G)         all sums and products modulo 2**64
    stream       = BLAKE2b-64(seed, level, candidate, parameter name), personalised with b"roulette"

In the digest's input the three numbers are little-endian int64 and the name is UTF-8. The digest is read as a
little-endian number.

`mix` is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), and `G` is its odd constant 0x9E3779B97F4A7C15. The bits of a weight are therefore the same on every
device, in every shard and in any order of evaluation.
"""

from __future__ import annotations

import math
import struct
from hashlib import blake2b

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the int64 with the same bits
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_ONE = 0x3FF << 52  # the bits of the float64 1.0; with any 52 bits below them it is a number in [1, 2)


def stream(seed: int, level: int, candidate: int, name: str) -> int:
    """Return the stream of chance of one parameter of one candidate, a signed 64-bit number."""
    payload = struct.pack("<qqq", seed, level, candidate) + name.encode()
    return int.from_bytes(blake2b(payload, digest_size=8, person=b"roulette").digest(), "little", signed=True)


def moved(stream: int, start: int) -> int:
    """Return the stream in which index 0 has the random bits that index `start` has in `stream`."""
    return (stream + start * _GOLDEN + 2**63) % 2**64 - 2**63


def random_bits(stream: int | Tensor, index: Tensor) -> Tensor:
    """Return 64 random bits for each index, int64.

    Args:
        stream: One stream for all indices, or int64 of the shape of `index`.
        index: int64, any shape.

    Returns:
        Shape of `index`.
    """
    bits = index * _GOLDEN
    bits += stream
    bits += _GOLDEN
    shifted = torch.empty_like(bits)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        bits ^= _shifted_right(bits, shift, shifted)
        bits *= factor
    bits ^= _shifted_right(bits, 31, shifted)
    return bits


def uniforms(stream: int | Tensor, index: Tensor) -> Tensor:
    """Return a uniform number for each index, float64: the midpoint of one of 2**52 equal parts of (0, 1)."""
    bits = random_bits(stream, index)
    one_to_two = _shifted_right(bits, 12, bits).bitwise_or_(_ONE).view(torch.float64)
    return one_to_two.sub_(1 - 2.0**-53)  # exact


def normal(stream: int) -> float:
    """Return one standard normal number, by the method of Box and Muller (1958).

    It uses the indices -1 and -2 of the stream, which no weight has.
    """
    radius, angle = uniforms(stream, torch.tensor([-1, -2])).tolist()
    return math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)


def log_clocks(stream: int | Tensor, index: Tensor) -> Tensor:
    """Return the logarithm of an exponential clock of rate 1 for each index: `log E`, float64, shape of `index`.

    `E = -log U`, where `U` comes from `uniforms`. `log E` is always finite and lies between -36.8 and 3.7.
    """
    return uniforms(stream, index).log_().neg_().log_()


def _shifted_right(bits: Tensor, shift: int, out: Tensor) -> Tensor:
    """Write the logical shift into `out`. The shift of torch repeats the sign bit of an int64."""
    return torch.bitwise_right_shift(bits, shift, out=out).bitwise_and_((1 << (64 - shift)) - 1)
