"""The exact p-value of a mean over samples, by betting against the null hypothesis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_roulette.judge.outcomes import Singles, differences
from lightning_roulette.wheel.chance import random_bits, stream

_BLOCKS = 200  # how often bets change, at most
_PRIOR_SQUARES = 4.0
_MARGIN = 1e-9  # added to the goal, so that rounding does not miss it


def betting_p(dense: Singles, pruned: Singles, tolerance: float, confidence: float) -> float:
    """Return the p-value `exp(-log_wealth)`. It is 1 if there are no samples, or if a sample is not finite.

    Data may be ordered, for example by class. The bound needs an order that is independent of the samples, so they are
    shuffled, always in the same way.
    """
    declines, width = differences(dense, pruned), dense.high - dense.low
    if not len(declines) or not bool(torch.isfinite(declines).all()) or tolerance <= -width:
        return 1.0
    if tolerance >= width:
        return 0.0
    order = random_bits(stream(0, 0, 0, "order of bets"), torch.arange(len(declines))).argsort(stable=True)
    return math.exp(-float(log_wealth(declines[order] / width, tolerance / width, confidence)))


def log_wealth(declines: Tensor, tolerance: float, confidence: float = 0.95) -> Tensor:
    """Return the logarithm of the largest wealth in a game that the null hypothesis makes unfavourable.

    The wealth starts at 1. Each sample multiplies it by `1 + bet * (tolerance - decline)`, where the bet lies in
    `[0, 1 / (1 - tolerance)]` and is chosen before the sample is seen. If the mean decline is at least the tolerance,
    the wealth is a non-negative supermartingale. It reaches `x` with probability at most `1 / x` (Ville), so its
    inverse is a p-value (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B
    2024).

    The choice of the bets only affects the power. These bets aim at a wealth of `1 / (1 - confidence)` at the last
    sample (Voracek and Orabona, "STaR-Bets", 2025, arXiv:2505.22422):

        bet = sqrt(2 * need / (left * square)), at least expm1(need / left) / tolerance, at most 1 / (1 - tolerance)

    - `need` is the logarithm of the factor that the wealth lacks.
    - `left` is the number of remaining samples.
    - `square` is the mean squared decline so far. It starts at 4.
    - The lower limit reaches the goal if no further sample differs.
    - After a goal is reached, the next goal is the next power of it.
    - Bets change at most 200 times.

    Share of networks certified at a tolerance of 0.005 and a confidence of 0.95, for flips (worse + better) in percent.
    The columns are these bets, the best of four fixed bets in hindsight, bets by the rate of growth (aGRAPA, up to half
    of the largest bet), and a mixture of 8 bets on a geometric grid. All use their largest wealth:

        samples  flips      these  hindsight  growth  mixture
          1,000  1 + 1       0.22       0.18    0.12     0.05
          5,000  1 + 1       0.75       0.64    0.43     0.40
         10,000  1 + 1       0.96       0.90    0.74     0.79
          1,000  0.2 + 0.2   0.57       0.46    0.19     0.20
          5,000  0.25 + 0    0.86       0.78    0.72     0.51

    Args:
        declines: Shape `(..., samples)`, float64, in [-1, 1]: the dense minus the pruned score of each sample, in
            units of the width of a score.
        tolerance: Less than 1, in the same units.
        confidence: In (0, 1): sets the goal of the bets.

    Returns:
        Shape `(...)`, non-negative.
    """
    samples, seen = declines.shape[-1], 0
    goal, most = _MARGIN - math.log(1 - confidence), 1 / (1 - tolerance)
    wealth, squares = declines.new_zeros(declines.shape[:-1]), declines.new_full(declines.shape[:-1], _PRIOR_SQUARES)
    best = wealth
    for block in declines.split(max(1, math.ceil(samples / _BLOCKS)), dim=-1):
        need = (goal * (torch.floor(best / goal) + 1) - wealth).clamp(min=0)  # negative by rounding only
        pace = need / (samples - seen)
        bet = _bet(pace, squares / (1 + seen), tolerance).clamp(max=most)
        # a factor is never negative; the clamp only undoes rounding
        gains = (bet.unsqueeze(-1) * (tolerance - block)).clamp_(min=-1).log1p_().cumsum(-1).add_(wealth.unsqueeze(-1))
        best, wealth = torch.maximum(best, gains.amax(-1)), gains[..., -1]
        squares, seen = squares + block.square().sum(-1), seen + block.shape[-1]
    return best


def _bet(pace: Tensor, square: Tensor, tolerance: float) -> Tensor:
    """Return the bet for a growth of the log wealth by `pace` per sample, before the upper limit."""
    bold = (2 * pace / square).sqrt()
    return torch.maximum(bold, pace.expm1() / tolerance) if tolerance > 0 else bold
