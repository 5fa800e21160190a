"""Simulated searches with known truth: is the certificate valid, and how much data does it need?

Every search has a chain of 20 nested networks, and new validation samples. A sample that becomes wrong (or right) by
pruning stays wrong (or right) in all slimmer networks. The levels are tested in order up to the first that fails. The
last level that passed is the winner. Two tests are compared:

- by the mean: a level passes if its mean decline is at most the tolerance;
- by the certificate: a level passes if its p-value is at most 0.05.
"""

import argparse
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_roulette.judge.betting import log_wealth

TOLERANCE, CONFIDENCE, LEVELS = 0.005, 0.95, 20
AT_ONCE = 4_000_000  # samples in memory at a time
Chain = list[tuple[float, float]]  # per level: shares of samples that become wrong, and right

_JUST_TOO_MUCH = TOLERANCE * (1 + 1e-9)
CHAINS: dict[str, Chain] = {
    "decline grows by 0.1 points a level": [(0.002 * level, 0.001 * level) for level in range(1, LEVELS + 1)],
    "2 without decline, 18 just too much": [(0.001 * level, 0.001 * level) for level in (1, 2)]
    + [(_JUST_TOO_MUCH + 0.001 * level, 0.001 * level) for level in range(3, LEVELS + 1)],
    "20 just too much, none better": [(_JUST_TOO_MUCH, 0.0)] * LEVELS,
}
FLIPS = {
    "none": (0.0, 0.0),
    "0.2 % worse, 0.2 % better": (0.002, 0.002),
    "1 % worse, 1 % better": (0.01, 0.01),
    "0.25 % worse": (0.0025, 0.0),
}


def declines(uniform: Tensor, worse: float, better: float) -> Tensor:
    """Return 1 where a sample becomes wrong and -1 where it becomes right. Samples are nested in both shares."""
    return (uniform < worse).double() - (uniform >= 1 - better).double()


def passes_by_mean(decline: Tensor) -> Tensor:
    return decline.mean(-1) <= TOLERANCE


def passes_by_certificate(decline: Tensor) -> Tensor:
    return log_wealth(decline, TOLERANCE, CONFIDENCE) >= -math.log(1 - CONFIDENCE)


def draws(searches: int, samples: int, seed: int) -> Iterator[Tensor]:
    """Yield the validation samples of all searches, in batches of searches."""
    chance, batch = torch.Generator().manual_seed(seed), max(1, AT_ONCE // samples)
    for start in range(0, searches, batch):
        yield torch.rand(min(batch, searches - start), samples, generator=chance, dtype=torch.float64)


def winners(uniform: Tensor, chain: Chain, passes: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the level of each search's winner, 0 if no level passed."""
    levels, on = torch.zeros(len(uniform), dtype=torch.int64), torch.arange(len(uniform))
    for level, (worse, better) in enumerate(chain, start=1):
        on = on[passes(declines(uniform[on], worse, better))]
        levels[on] = level
        if not len(on):
            break
    return levels


def share(flags: list[Tensor]) -> float:
    return float(torch.cat(flags).double().mean())


def broken(searches: int, samples: int, chain: Chain, seed: int) -> list[float]:
    """Return three shares of searches.

    The winner is beyond the tolerance by the mean; the same by the certificate; any level is certified.
    """
    beyond = torch.tensor([False] + [worse - better > TOLERANCE * (1 + 1e-12) for worse, better in chain])
    levels = [
        [winners(uniform, chain, passes) for passes in (passes_by_mean, passes_by_certificate)]
        for uniform in draws(searches, samples, seed)
    ]
    by_mean, certified = ([pair[i] for pair in levels] for i in (0, 1))
    return [
        share([beyond[one] for one in by_mean]),
        share([beyond[one] for one in certified]),
        share([one > 0 for one in certified]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=1000)
    searches = parser.parse_args().searches
    error = 2 * math.sqrt(0.05 * 0.95 / searches)
    print(
        f"Tolerance {TOLERANCE}, confidence {CONFIDENCE}, {searches} searches (5 % plus two standard errors: "
        f"{0.05 + error:.1%})\n"
    )
    print(f"{'chain of 20 levels':36} samples  winner beyond the tolerance     any level")
    print(f"{'':36}          by mean    by certificate     certified")
    for seed, (name, chain) in enumerate(CHAINS.items()):
        for samples in (200, 1_000, 5_000, 20_000):
            by_mean, certified, some = broken(searches, samples, chain, seed)
            print(f"{name:36} {samples:7,}  {by_mean:7.1%}  {certified:16.1%}  {some:12.1%}", flush=True)
    sizes = (600, 1_000, 2_000, 5_000, 10_000, 20_000)
    print("\nShare of searches that certify a level, by validation samples\n")
    print(f"{'flips':28}" + "".join(f"{size:>9,}" for size in sizes))
    for name, flips in FLIPS.items():
        power = [
            share([winners(one, [flips], passes_by_certificate) > 0 for one in draws(searches, n, 9)]) for n in sizes
        ]
        print(f"{name:28}" + "".join(f"{one:9.3f}" for one in power), flush=True)


if __name__ == "__main__":
    main()
