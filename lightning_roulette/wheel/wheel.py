"""The roulette wheel: from importance and survivors to the weights at which it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_roulette.checks import check_choice, check_number, check_seed
from lightning_roulette.large.bits import Bits, flat_part
from lightning_roulette.large.devices import with_float64
from lightning_roulette.large.limits import limits
from lightning_roulette.large.shards import Shards
from lightning_roulette.mask.mask import Mask
from lightning_roulette.settings import SCOPES
from lightning_roulette.wheel.chance import log_clocks, moved, random_bits, stream, uniforms
from lightning_roulette.wheel.importance import Magnitudes

# log E spans less than 42 (see chance.log_clocks); what lies further below the rest is always drawn before it.
_BELOW_ALL = 64.0
_ALMOST, _ROUNDING = 1 - 2.0**-20, 1e-6
_ALL = slice(0, None)
_SIGMAS = 5.0  # how far about its guess a threshold is first looked for


def spin(importance: Tensor, survivors: Tensor, draws: int, *, sharpness: float, seed: int) -> Tensor:
    """The weights at which the wheel stops when it is spun `draws` times, each sector leaving once hit.

    The next weight is `i` with probability `odds[i]` over the odds still on the wheel, where
    `odds = importance ** -sharpness` (Plackett-Luce). All draws come from one race of exponential clocks, clock `i`
    running at rate `odds[i]`; the first `draws` to ring are the draw (Efraimidis and Spirakis 2006). Sharpness 0 prunes
    at random; infinity prunes the least important, ties in order of index.

    Args:
        importance: Shape `(n,)`, finite and non-negative. Scale does not matter; zero is drawn first at every
            sharpness above 0.
        survivors: Shape `(n,)`, bool. Only these are on the wheel.
        draws: How many distinct weights, at most the number of survivors.
        sharpness: The exponent, 0 to infinity.
        seed: Equal seed, equal draw, on every device (up to ties of rounded logarithms).

    Returns:
        Shape `(n,)`, bool: True where a weight is drawn for pruning.

    Raises:
        ValueError: If `draws` exceeds the survivors, `sharpness` is negative, or an importance is negative or not
            finite.

    Example:
        >>> spin(torch.tensor([3.0, 1.0, 2.0]), torch.ones(3, dtype=torch.bool), 2, sharpness=math.inf, seed=0)
        tensor([False,  True,  True])
    """
    if importance.dim() != 1 or survivors.shape != importance.shape or survivors.dtype != torch.bool:
        raise ValueError(
            f"importance has shape {tuple(importance.shape)} and survivors shape {tuple(survivors.shape)} of "
            f"{survivors.dtype}, but both must be vectors of one length, survivors of bool. Flatten them first."
        )
    check_seed(seed)
    sectors = Sectors({"": importance}, Mask({"": survivors}), sharpness=sharpness)
    return survivors & ~sectors.spin(draws, seed=seed, level=0, candidate=0)[""]


class Sectors:
    """One level's wheel: what all candidates of a branch share, so that each is but one race of clocks.

    The key of a survivor is `log E + sharpness * log importance` (`importance` itself where sharpness is infinite); the
    smallest keys are drawn. Logarithms keep `w ** -sharpness` from overflowing.

    Up to 2**24 weights it holds the second term of every survivor, and their indices where not all weights of a
    parameter survive: 12 bytes a survivor. Up to 2**20 weights it holds up to 48, which makes the spins that follow the
    first quicker. Of more weights it holds `importance` and the parent alone, and each spin makes the terms again.

    Args:
        importance: Non-negative and finite, one tensor per parameter of `parent`, of its shape.
        parent: The mask whose survivors are on the wheel.
        sharpness: Exponent of the odds.
        scope: `"global"`, one wheel over all parameters, or `"layer"`, one for each, sharing the draws in proportion
            to their survivors.
        shards: Where the weights lie in several processes, those of this one; `importance` then is that of `shards.own`
            alone, while masks are those of the whole network. All processes make the wheel, and spin it, alike.

    Raises:
        ValueError: If an importance is negative or not finite, or `sharpness` is negative.
    """

    def __init__(
        self,
        importance: Mapping[str, Tensor],
        parent: Mask,
        *,
        sharpness: float,
        scope: str = "global",
        shards: Shards | None = None,
    ) -> None:
        check_number("sharpness", sharpness, at_least=0, remedy="Infinity is magnitude pruning.")
        check_choice("scope", scope, SCOPES)
        self.parent = _with_float64(parent)
        self.sharpness, self.scope, self._shards = sharpness, scope, shards
        make = _long_arcs if self.parent.size > limits().held_weights else _arcs
        if shards is None:
            arcs = make(importance, self.parent, sharpness)
        else:
            _check_everywhere(importance, shards)
            arcs = make(importance, Mask(shards.own_mask(self.parent.stored)), sharpness, shards.least)
        groups = [arcs] if scope == "global" else [{name: arc} for name, arc in arcs.items()]
        self._wheels = [_Wheel(group) if shards is None else _AgreedWheel(group, shards) for group in groups]

    def spin(self, draws: int, *, seed: int, level: int, candidate: int) -> Mask:
        """The parent's mask with exactly `draws` weights fewer.

        Beyond the mask it takes a byte for each weight of one parameter, one block of keys and the few keys near the
        threshold; eight bytes for each weight where these are few. Of more than 2**24 weights a block takes the place
        of the parameter, and the mask takes a bit for each weight.

        Args:
            draws: How many weights leave, at most all survivors.
            seed: With `level` and `candidate` and each parameter's name, the source of all chance.
            level: See `seed`.
            candidate: See `seed`.

        Raises:
            ValueError: If there are fewer survivors than `draws`, or with a wheel for each layer fewer that may go.
        """
        survivors = sum(wheel.count for wheel in self._wheels)
        if not 0 <= draws <= survivors:
            raise ValueError(f"draws is {draws}, but must lie between 0 and the {survivors} survivors.")
        chance = not math.isinf(self.sharpness)
        streams = {name: stream(seed, level, candidate, name) for name in self.parent} if chance else {}
        kept: dict[str, Tensor | Bits] = {}
        for wheel, share in zip(self._wheels, self._shares(draws), strict=True):
            kept |= wheel.spin(share, streams)
        if self._shards is not None:
            return Mask(self._shards.whole(kept, {name: at.shape for name, at in self.parent.stored.items()}))
        return Mask({name: _shaped(kept[name], at.shape) for name, at in self.parent.stored.items()})

    def _shares(self, draws: int) -> list[int]:
        """The draws of each wheel."""
        if self.scope == "global":
            return [draws]
        shares = layer_shares(draws, [wheel.count for wheel in self._wheels])
        if sum(shares) < draws:
            raise ValueError(f"draws is {draws}, but each layer keeps a weight: at most {sum(shares)} may go.")
        return shares


def layer_shares(draws: int, survivors: Sequence[int]) -> list[int]:
    """How many of `draws` each layer gives: in proportion to its survivors, by largest remainder.

    No layer gives its last survivor, so the shares sum to `draws` or to all that may go. Equal remainders go to the
    earlier layer.

    Example:
        >>> layer_shares(5, [10, 10, 1])
        [3, 2, 0]
    """
    room = [max(0, count - 1) for count in survivors]
    draws, total = min(draws, sum(room)), max(1, sum(survivors))
    shares = [min(free, draws * count // total) for free, count in zip(room, survivors, strict=True)]
    by_remainder = sorted(range(len(room)), key=lambda layer: -(draws * survivors[layer] % total))
    while sum(shares) < draws:
        for layer in by_remainder:
            if sum(shares) < draws and shares[layer] < room[layer]:
                shares[layer] += 1
    return shares


@dataclass(frozen=True)
class _Arc:
    """Survivors of one parameter, in order of index: a stretch of a wheel.

    Attributes:
        size: How many weights the parameter has, pruned ones too.
        index: Where each lies in the flattened parameter; None if nothing of it is pruned.
        terms: What each key has beside the logarithm of its clock.
        owners: Of several parameters one after the other, the number of each survivor's; None for one parameter.
        own_index: Where each lies in that parameter alone; None for one parameter.
    """

    size: int
    index: Tensor | None
    terms: Tensor
    owners: Tensor | None = None
    own_index: Tensor | None = None

    @property
    def count(self) -> int:
        """How many survivors there are."""
        return len(self.terms)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.terms.device

    def at(self, positions: Tensor) -> _Arc:
        """Some of the survivors, counted from 0."""
        index = positions if self.index is None else self.index[positions]
        if self.owners is None or self.own_index is None:
            return _Arc(self.size, index, self.terms[positions])
        return _Arc(self.size, index, self.terms[positions], self.owners[positions], self.own_index[positions])

    def blocks(self) -> Iterator[slice]:
        """The survivors a block at a time; one block if there are none."""
        size = _block_on(self.device)
        return (slice(start, start + size) for start in range(0, max(1, len(self.terms)), size))

    def places(self, block: slice) -> Tensor:
        """The indices of a block, int64."""
        if self.index is None:
            return torch.arange(block.start, min(block.stop, len(self.terms)), device=self.terms.device)
        return self.index[block].to(torch.int64)

    def write(self, kept: Tensor, block: slice, stays: Tensor) -> None:
        """Write into `kept`, flat, whether each survivor of a block stays."""
        if self.index is None:
            kept[block] = stays
        else:
            kept.scatter_(0, self.places(block), stays)

    def keys(self, stream: int | Tensor | None, block: slice, places: Tensor) -> Tensor:
        """The keys of a block, float64; without a stream (one for each owner), chance has no part in them."""
        terms = self.terms[block]
        if stream is None:
            return terms.to(torch.float64)
        if self.owners is not None and self.own_index is not None:
            assert isinstance(stream, Tensor)
            return log_clocks(stream[self.owners[block]], self.own_index[block]).add_(terms)
        return log_clocks(stream, places).add_(terms)

    def all_keys(self, stream: int | None) -> Iterator[Tensor]:
        """The keys, a block at a time."""
        return (self.keys(stream, block, self.places(block)) for block in self.blocks())

    def cut(self, stream: int | Tensor | None, low: float, high: float) -> _Cut:
        """Keep the survivors whose keys are `low` or more; those among them with keys up to `high` are near."""
        kept = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        near = torch.empty(self.count, dtype=torch.bool, device=self.device)
        for block in self.blocks():
            places = self.places(block)
            keys = self.keys(stream, block, places)
            stays = keys >= low
            self.write(kept, block, stays)
            near[block] = stays.logical_and_(keys <= high)
        found = self.at(near.nonzero().flatten())
        places = found.places(_ALL)
        return _Cut(kept, places, found.keys(stream, _ALL, places))


@dataclass(frozen=True)
class _LongArc:
    """Survivors of one parameter of which nothing is held: all is made again, a block of weights at a time.

    Attributes:
        parent: Which weights are on the wheel.
        importance: That of the weights between two indices of the flattened parameter.
        term: What makes terms of importance.
        counts: How many survivors each block has.
    """

    parent: Bits
    importance: Callable[[int, int], Tensor]
    term: Callable[[Tensor], Tensor]
    counts: Sequence[int]

    @property
    def size(self) -> int:
        """How many weights the parameter has, pruned ones too."""
        return self.parent.numel()

    @property
    def count(self) -> int:
        """How many survivors there are."""
        return sum(self.counts)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.parent.device

    def at(self, positions: Tensor) -> _Arc:
        """Some of the survivors, counted from 0, in ascending order."""
        ends = torch.tensor([0, *accumulate(self.counts)], device=positions.device)
        parts = positions.tensor_split(torch.searchsorted(positions, ends[1:]).tolist())
        index = [torch.empty(0, dtype=torch.int64, device=self.device)]
        terms = [torch.empty(0, dtype=torch.float64, device=self.device)]
        for (_, places, values), part, end in zip(self._blocks(), parts, ends.tolist(), strict=False):
            index.append(places[part - end])
            terms.append(self.term(values[part - end]))
        return _Arc(self.size, torch.cat(index), torch.cat(terms))

    def all_keys(self, stream: int | None) -> Iterator[Tensor]:
        """The keys, a block at a time."""
        for size, places, values in self._blocks():
            yield _Arc(size, places, self.term(values)).keys(stream, _ALL, places)

    def cut(self, stream: int | Tensor | None, low: float, high: float) -> _Cut:
        """Keep the survivors whose keys are `low` or more; those among them with keys up to `high` are near."""
        kept, start = Bits.empty(self.parent.shape, self.device), 0
        near = [torch.empty(0, dtype=torch.int64, device=self.device)]
        their_keys = [torch.empty(0, dtype=torch.float64, device=self.device)]
        for size, places, values in self._blocks():
            keys = _Arc(size, places, self.term(values)).keys(stream, _ALL, places)
            stays = keys >= low
            found = stays.logical_and(keys <= high).nonzero().flatten()
            near.append(places[found])
            their_keys.append(keys[found])
            if len(places) < size:
                stays = stays.new_zeros(size).scatter_(0, places - start, stays)
            kept.write(start, stays)
            start += size
        return _Cut(kept, torch.cat(near), torch.cat(their_keys))

    def terms(self) -> Iterator[Tensor]:
        """What each key has beside the logarithm of its clock, a block at a time."""
        return (self.term(values) for _, _, values in self._blocks())

    def _blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each block how many weights it has, the indices of its survivors, and their importance."""
        for (start, stop), count in zip(self.parent.blocks(_block_on(self.device)), self.counts, strict=True):
            values = self.importance(start, stop)
            if count == stop - start:
                yield stop - start, torch.arange(start, stop, device=self.device), values
            else:
                local = self.parent.part(start, stop).nonzero().flatten()
                yield stop - start, local + start, values[local]


class _Cut(NamedTuple):
    """Of one parameter what two numbers about the threshold say.

    Attributes:
        kept: Whether each weight stays; those near the threshold do as yet.
        places: Where those are whose keys are near it.
        keys: Of these.
    """

    kept: Tensor | Bits
    places: Tensor
    keys: Tensor

    @property
    def staying(self) -> int:
        """How many stay."""
        return self.kept.count() if isinstance(self.kept, Bits) else int(self.kept.count_nonzero())

    def remove(self, near: Tensor) -> Tensor | Bits:
        """What is kept without some of those near the threshold: bool, one for each."""
        if isinstance(self.kept, Bits):
            self.kept.clear(self.places[near])
        else:
            self.kept[self.places[near]] = False
        return self.kept


class _Guess(NamedTuple):
    """Two keys between which the threshold of other spins for as many draws most probably lies, and what they mean.

    Where a survivor's uniform number is above `drawn`, its key is below `low`; where it is below `stays`, above `high`.
    """

    draws: int
    low: float
    high: float
    drawn: Tensor
    stays: Tensor


class _Wheel:
    """Parameters that share their draws.

    The draw needs the one threshold that as many keys do not exceed as are drawn. A sample of the keys tells two
    numbers between which it most probably lies. Then all keys are made, block by block, and none is stored: those below
    both numbers are drawn, those above both stay, and only the few between are made again and compared with one
    another. Where the sample misled, which their counts show, the race is run again with the numbers further apart:
    the draw does not depend on the sample.

    On a small wheel the first spin's threshold takes the place of the sample in those that follow: the two numbers are
    then the same for each, and are compared with the uniform numbers, of which no logarithm need be taken.
    """

    def __init__(self, arcs: Mapping[str, _Arc | _LongArc]) -> None:
        self._parts = {name: arc.size for name, arc in arcs.items()}
        self._counts = [arc.count for arc in arcs.values()]
        self.count = sum(self._counts)
        # as one: with small parameters it is the number of operations that takes the time
        self._joint = _joined([arc for arc in arcs.values() if isinstance(arc, _Arc)]) if _are_few(arcs) else None
        self._arcs = dict(arcs) if self._joint is None else {"": self._joint}
        self._sample = _sample(self._arcs) if self.count > limits().compared_keys else {}
        self._guess: _Guess | None = None

    def spin(self, draws: int, streams: Mapping[str, int]) -> Mapping[str, Tensor | Bits]:
        """For each parameter, flat if it is a tensor, whether each weight stays."""
        if self._joint is None:
            return self._race(draws, streams or dict.fromkeys(self._arcs))
        known = torch.tensor([streams[name] for name in self._parts]).to(self._joint.device) if streams else None
        kept = torch.zeros(self._joint.size, dtype=torch.bool, device=self._joint.device)
        if known is None or not self._guessed(draws, known, kept):
            kept = cast(Tensor, self._race(draws, {"": known})[""])
        return dict(zip(self._parts, kept.split(list(self._parts.values())), strict=True))

    def _race(self, draws: int, streams: Mapping[str, int | Tensor | None]) -> dict[str, Tensor | Bits]:
        """Whether each weight stays."""
        sampled = [arc.keys(streams[name], _ALL, arc.places(_ALL)) for name, arc in self._sample.items()]
        cuts: list[_Cut] = []
        sigmas, missing = _SIGMAS, -1
        while not 0 <= missing <= sum(len(cut.keys) for cut in cuts):
            low, high = _bracket(sampled, draws / max(1, self.count), sigmas)
            cuts.clear()
            cuts += (arc.cut(streams[name], low, high) for name, arc in self._arcs.items())
            sigmas, missing = 2 * sigmas, draws - (self.count - sum(cut.staying for cut in cuts))
        drawn = _smallest([cut.keys for cut in cuts], missing)
        if self._joint is not None and streams[""] is not None and self.count > limits().compared_keys:
            self._guess = _guess(self._joint.terms, cuts[0].keys.sort().values, missing, draws)
        return {name: cut.remove(near) for name, cut, near in zip(self._arcs, cuts, drawn, strict=True)}

    def _guessed(self, draws: int, stream: Tensor, kept: Tensor) -> bool:
        """Write into `kept` whether each survivor stays, if the guess holds; else say that it does not."""
        guess, arc = self._guess, self._joint
        if guess is None or guess.draws != draws or arc is None or arc.own_index is None:
            return False
        each = torch.cat([one.expand(count) for one, count in zip(stream, self._counts, strict=True)])
        near = []
        for block in arc.blocks():
            chance = uniforms(each[block], arc.own_index[block])
            # of clocks that ring almost at once the logarithm is looked at, as rounding would tell in it
            stays = (chance <= guess.drawn[block]).logical_or_(chance >= _ALMOST)
            found = stays.logical_and(chance >= guess.stays[block]).nonzero().flatten()
            near.append((arc.places(block)[found], chance[found].log_().neg_().log_().add_(arc.terms[block][found])))
            arc.write(kept, block, stays)
        places, keys = (torch.cat(parts) for parts in zip(*near, strict=True))
        missing = draws - (self.count - int(kept.count_nonzero()))
        if not 0 < missing <= len(keys):
            return False
        drawn = _smallest([keys], missing)[0]
        kept[places[drawn]] = False
        return guess.low + _ROUNDING < float(keys[drawn].max()) < guess.high - _ROUNDING


class _AgreedWheel:
    """Parameters that share their draws, and whose weights lie in several processes.

    Each process makes the keys of its own weights: chance is counted, so they are those of one device. A histogram of
    the first digits of all keys, summed over the processes, tells between which two numbers the threshold lies; of the
    few keys between these, histograms of the further digits tell the threshold itself. Ties at it go to the earlier.
    """

    def __init__(self, arcs: Mapping[str, _Arc | _LongArc], shards: Shards) -> None:
        self._arcs, self._shards = arcs, shards
        self.count = int(shards.add(torch.tensor(sum(arc.count for arc in arcs.values()))))

    def spin(self, draws: int, streams: Mapping[str, int]) -> Mapping[str, Tensor | Bits]:
        """For each parameter, flat, whether each weight that this process answers for stays."""
        if draws == 0:
            return {name: arc.cut(None, -math.inf, -math.inf).kept for name, arc in self._arcs.items()}
        starts = {name: self._shards.spans[name][0] for name in self._arcs}
        ours = {name: moved(streams[name], start) if streams else None for name, start in starts.items()}
        blocks = (keys for name, arc in self._arcs.items() for keys in arc.all_keys(ours[name]))
        digit, missing = self._digit((_ordered(keys) for keys in blocks), 48, draws)
        low, high = (digit << 48) - 2**63, ((digit + 1) << 48) - 1 - 2**63
        cuts = [arc.cut(ours[name], _unordered(low), _unordered(high)) for name, arc in self._arcs.items()]
        near = [_ordered(cut.keys) for cut in cuts]
        threshold, missing = self._threshold(near, missing)
        drawn = [keys < threshold for keys in near]
        tied = [(keys == threshold).nonzero().flatten() for keys in near]
        for one, where, count in zip(drawn, tied, self._share_of_ties(tied, missing), strict=True):
            one[where[:count]] = True
        return {name: cut.remove(one) for name, cut, one in zip(self._arcs, cuts, drawn, strict=True)}

    def _threshold(self, near: Sequence[Tensor], rank: int) -> tuple[int, int]:
        """The key of this rank among those near it, and how many equal to it are drawn."""
        threshold = 0
        for shift in (48, 32, 16, 0):
            digit, rank = self._digit(near, shift, rank)
            threshold = threshold << 16 | digit
            near = [keys[_digits(keys, shift) == digit] for keys in near]
        return threshold - 2**63, rank

    def _digit(self, blocks: Iterable[Tensor], shift: int, rank: int) -> tuple[int, int]:
        """The digit that the key of this rank has, and its rank among the keys of this digit."""
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for keys in blocks:
            counts += _digits(keys, shift).bincount(minlength=1 << 16).cpu()
        counts = self._shards.add(counts)
        up_to = counts.cumsum(0)
        digit = int((up_to < rank).count_nonzero())
        return digit, rank - int(up_to[digit] - counts[digit])

    def _share_of_ties(self, tied: Sequence[Tensor], most: int) -> list[int]:
        """How many of its ties this process draws for each parameter: they go by parameter, then by index."""
        table = self._shards.each(torch.tensor([len(one) for one in tied]))
        by_order = table.T.flatten()
        earlier = (by_order.cumsum(0) - by_order).view(table.T.shape)[:, self._shards.rank]
        return [min(len(one), max(0, most - before)) for one, before in zip(tied, earlier.tolist(), strict=True)]


def _ordered(keys: Tensor) -> Tensor:
    """Float64 numbers, none of them NaN, as int64 in the same order; 0 and -0 as one."""
    bits = (keys + 0.0).view(torch.int64)
    return bits ^ ((bits >> 63) & (2**63 - 1))


def _unordered(number: int) -> float:
    """The float64 that `_ordered` makes this number of."""
    bits = torch.tensor(number)
    return float((bits ^ ((bits >> 63) & (2**63 - 1))).view(torch.float64))


def _digits(ordered: Tensor, shift: int) -> Tensor:
    """16 of their bits, as numbers from 0; the sign, which is the first, so that they are in order."""
    return ((ordered ^ -(2**63)) >> shift) & 0xFFFF


def _check_everywhere(importance: Mapping[str, Tensor], shards: Shards) -> None:
    """Raise in all processes what one finds."""
    found: ValueError | None = None
    try:
        for name, values in importance.items():
            _check(name, values)
    except ValueError as error:
        found = error
    if shards.anywhere(found is not None):
        raise found or ValueError("importance has negative, infinite or NaN entries in another process.")


def _guess(terms: Tensor, ascending: Tensor, rank: int, draws: int) -> _Guess | None:
    """What the keys about one spin's threshold, which is that of this rank, say of the threshold of others.

    The number of keys below a given one differs between spins by about `sqrt(draws)`, or less.
    """
    margin = math.ceil(8 * math.sqrt(2 * draws)) + 8
    first, last = max(0, rank - 1 - margin), min(len(ascending), rank + margin) - 1
    if not first < rank - 1 < last:
        return None
    low, high = float(ascending[first]), float(ascending[last])
    return _Guess(draws, low, high, *((key - terms).exp_().neg_().exp_() for key in (low, high)))


def _are_few(arcs: Mapping[str, _Arc | _LongArc]) -> bool:
    """Whether parameters are taken as one: they have few weights in all, all of them held on one device."""
    held = all(isinstance(arc, _Arc) for arc in arcs.values())
    return (
        held
        and sum(arc.size for arc in arcs.values()) <= limits().joint_weights
        and len({a.device for a in arcs.values()}) == 1
    )


def _joined(arcs: Sequence[_Arc]) -> _Arc:
    """The survivors of several parameters, one parameter after the other."""
    device, counts = arcs[0].device, torch.tensor([arc.count for arc in arcs])
    sizes = [arc.size for arc in arcs]
    owners = torch.arange(len(arcs)).repeat_interleave(counts).to(device)
    starts = torch.tensor([0, *accumulate(sizes)][:-1]).to(device)[owners]
    own_index = torch.cat([arc.places(slice(0, arc.count)) for arc in arcs])
    index = None if all(arc.index is None for arc in arcs) else own_index + starts
    return _Arc(sum(sizes), index, torch.cat([arc.terms for arc in arcs]), owners, own_index)


def _sample(arcs: Mapping[str, _Arc | _LongArc]) -> dict[str, _Arc]:
    """Survivors picked blindly, with replacement: more of a large wheel, but a smaller share."""
    ends = list(accumulate(arc.count for arc in arcs.values()))
    picked = random_bits(0, torch.arange(int(2 * ends[-1] ** (2 / 3)))).remainder_(ends[-1]).sort().values
    parts = picked.tensor_split(torch.searchsorted(picked, torch.tensor(ends[:-1], dtype=torch.int64)).tolist())
    starts = zip(arcs.items(), parts, [0, *ends], strict=False)
    return {name: arc.at((part - start).to(arc.device)) for (name, arc), part, start in starts}


def _bracket(sampled: Sequence[Tensor], share: float, sigmas: float) -> tuple[float, float]:
    """Between which two numbers a `share` of all keys most probably ends, by the rank of its end in a sample of them.

    The rank is binomial; it is given `sigmas` of its standard deviation, and as many ranks, to either side.
    """
    if not sampled:
        return -math.inf, math.inf
    keys = torch.cat([values.to(sampled[0].device) for values in sampled])
    rank, margin = share * len(keys), sigmas * (1 + math.sqrt(len(keys) * share * (1 - share)))
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    low = float(keys.kthvalue(first).values) if first >= 1 else -math.inf
    return low, float(keys.kthvalue(last).values) if last <= len(keys) else math.inf


def _block_on(device: torch.device) -> int:
    return limits().block_keys if device.type == "cpu" else limits().block_keys_off_cpu


def _shaped(kept: Tensor | Bits, shape: torch.Size) -> Tensor | Bits:
    return kept.view(shape) if isinstance(kept, Tensor) else kept


def _with_float64(mask: Mask) -> Mask:
    """The mask where float64 is; packed tensors are there."""
    return Mask({n: with_float64(kept) if isinstance(kept, Tensor) else kept for n, kept in mask.stored.items()})


def _alone(value: float) -> float:
    """The least of one number."""
    return value


def _arcs(
    importance: Mapping[str, Tensor], parent: Mask, sharpness: float, least_of: Callable[[float], float] = _alone
) -> dict[str, _Arc]:
    """Arcs that hold what keys are made of."""
    index = {name: _survivors(kept) for name, kept in parent.items()}
    known = {name: importance[name].detach() for name in parent}
    for name, values in known.items():
        _check(name, values)
    alive = {name: _alive(known[name].to(kept.device), index[name]) for name, kept in parent.stored.items()}
    terms = _terms(alive, sharpness, least_of)
    return {name: _Arc(kept.numel(), index[name], terms[name]) for name, kept in parent.stored.items()}


def _long_arcs(
    importance: Mapping[str, Tensor], parent: Mask, sharpness: float, least_of: Callable[[float], float] = _alone
) -> dict[str, _LongArc]:
    """Arcs that hold nothing but importance and mask."""
    arcs, least = {}, math.inf
    for name, stored in parent.stored.items():
        kept = stored if isinstance(stored, Bits) else Bits.of(stored)
        read = _reader(importance, name, kept.device)
        blocks = list(kept.blocks(_block_on(kept.device)))
        least = min([least, *(_check(name, read(*block)) for block in blocks)])
        arcs[name] = _LongArc(kept, read, partial(_term, sharpness=sharpness), [kept.count(*block) for block in blocks])
    if not 0 < sharpness < math.inf or least_of(least) > 0:
        return arcs
    bottom = _bottom((terms for arc in arcs.values() for terms in arc.terms()), least_of)
    return {name: replace(arc, term=partial(_term, sharpness=sharpness, bottom=bottom)) for name, arc in arcs.items()}


def _reader(importance: Mapping[str, Tensor], name: str, device: torch.device) -> Callable[[int, int], Tensor]:
    """What gives the importance of the weights between two indices of a flattened parameter."""
    if isinstance(importance, Magnitudes):
        part: Callable[[int, int], Tensor] = partial(importance.part, name)
    else:
        part = partial(flat_part, importance[name].detach())
    return lambda start, stop: part(start, stop).to(device)


def _survivors(kept: Tensor) -> Tensor | None:
    """The indices of what is kept, in the smallest type that holds them; None if that is everything."""
    if bool(kept.all()):
        return None
    fits = kept.numel() <= torch.iinfo(torch.int32).max
    return kept.flatten().nonzero().flatten().to(torch.int32 if fits else torch.int64)


def _alive(importance: Tensor, index: Tensor | None) -> Tensor:
    """A new tensor of the survivors' importance."""
    return importance.flatten().clone() if index is None else importance.flatten()[index]


def _check(name: str, importance: Tensor) -> float:
    """The least importance."""
    least, most = importance.aminmax() if importance.numel() else (importance.new_zeros(()),) * 2
    if not bool((least >= 0) & (most < math.inf)):
        raise ValueError(
            f"importance of {name or 'the weights'} has negative, infinite or NaN entries, but must be finite and "
            "non-negative. Do the weights hold NaN or infinity?"
        )
    return float(least)


def _terms(
    importance: Mapping[str, Tensor], sharpness: float, least_of: Callable[[float], float] = _alone
) -> dict[str, Tensor]:
    """Importance as it is where sharpness is infinite, else `sharpness * log importance`, zeros below all others."""
    terms = {name: _term(values, sharpness) for name, values in importance.items()}
    if not 0 < sharpness < math.inf:
        return terms
    if least_of(-float(any(bool(values.isneginf().any()) for values in terms.values()))) < 0:
        bottom = _bottom(terms.values(), least_of)
        for values in terms.values():
            values.clamp_(min=bottom)
    return terms


def _term(importance: Tensor, sharpness: float, bottom: float = -math.inf) -> Tensor:
    """Importance as it is where sharpness is infinite, else `sharpness * log importance`, at least `bottom`."""
    if math.isinf(sharpness):
        return importance
    if sharpness == 0:
        return torch.zeros((), dtype=torch.float64, device=importance.device).expand(len(importance))
    terms = importance.to(torch.float64, copy=True).log_().mul_(sharpness)
    return terms if bottom == -math.inf else terms.clamp_(min=bottom)


def _bottom(terms: Iterable[Tensor], least_of: Callable[[float], float] = _alone) -> float:
    """A number so far below all terms but minus infinity that no clock makes up for it."""
    lowest = 0.0
    for values in terms:
        finite = values[values > -math.inf]
        lowest = min(lowest, float(finite.min())) if len(finite) else lowest
    lowest = least_of(lowest)
    return min(lowest - _BELOW_ALL, lowest * (1 + 2.0**-50))  # the latter where the sharpness dwarfs the former


def _smallest(keys: Sequence[Tensor], draws: int) -> list[Tensor]:
    """For each tensor of keys, bool: which are among the `draws` smallest of all; ties go to the earlier."""
    joined = torch.cat([values.to(keys[0].device) for values in keys])
    if draws == 0:
        drawn = torch.zeros_like(joined, dtype=torch.bool)
    else:
        threshold = joined.kthvalue(draws).values
        drawn = joined < threshold
        tied = (joined == threshold).nonzero().flatten()
        drawn[tied[: draws - int(drawn.sum())]] = True
    parts = drawn.split([len(values) for values in keys])
    return [part.to(values.device) for part, values in zip(parts, keys, strict=True)]
