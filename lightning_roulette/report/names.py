"""Names of parameters in a few words."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_roulette.report.records import Skipped

_MOST = 3  # this many names are listed
_MOST_REASONS = 5  # and this many reasons


def shortened(names: Sequence[str]) -> str:
    """Return names of parameters in a few words.

    Examples:
        >>> shortened(["head.weight", "head.bias"])
        'head.weight, head.bias'
        >>> shortened([f"blocks.{i}.{one}.weight" for i in range(4) for one in ("up", "down")])
        'blocks.*.up.weight, blocks.*.down.weight'
    """
    patterns = list(dict.fromkeys(".".join("*" if one.isdigit() else one for one in name.split(".")) for name in names))
    if len(names) <= _MOST or len(patterns) <= _MOST:
        return ", ".join(names if len(names) <= _MOST else patterns)
    if shared := _shared_start([name.split(".")[:-1] for name in names]):
        return f"{'.'.join(shared)}.* ({len(names)} parameters)"
    return f"{', '.join(patterns[: _MOST - 1])} and others ({len(names)} parameters)"


def layer_names(names: Sequence[str]) -> dict[str, str]:
    """Return a short name for each parameter, by its name: without `.weight`, and without modules that all share.

    The last shared module stays. Names that would become equal keep their endings.

    Examples:
        >>> layer_names(["net.body.0.weight", "net.body.2.weight"])
        {'net.body.0.weight': 'body.0', 'net.body.2.weight': 'body.2'}
        >>> layer_names(["lstm.weight_ih_l0", "lstm.weight_hh_l0"])
        {'lstm.weight_ih_l0': 'lstm.weight_ih_l0', 'lstm.weight_hh_l0': 'lstm.weight_hh_l0'}
    """
    ends = [name.removesuffix(".weight") for name in names]
    unique = len(set(ends)) == len(ends)
    parts = [name.split(".") for name in (ends if unique else names)]
    shared = _shared_start([one[:-1] for one in parts])
    left_out = max(0, len(shared) - 1) if len(names) > 1 else 0
    return {name: ".".join(one[left_out:]) for name, one in zip(names, parts, strict=True)}


def _shared_start(parts: Sequence[Sequence[str]]) -> list[str]:
    """Return the first modules that all names share."""
    shared = []
    for ones in zip(*parts, strict=False):
        if len(set(ones)) > 1:
            break
        shared.append(ones[0])
    return shared


def listed(skipped: Sequence[Skipped]) -> str:
    """Return which weights are not prunable, and why, in a few words.

    Examples:
        >>> listed([Skipped(("embed.weight",), 7000, "weight of Embedding"), Skipped(("head.weight",), 300, "frozen")])
        '7,000 in embed.weight (weight of Embedding); 300 in head.weight (frozen)'
    """
    found = [f"{one.weights:,} in {shortened(one.names)} ({one.why})" for one in skipped[:_MOST_REASONS]]
    if rest := sum(one.weights for one in skipped[_MOST_REASONS:]):
        found.append(f"{rest:,} for other reasons")
    return "; ".join(found)
