"""From counts of right and wrong guesses to bounds that hold with stated confidence.

Pure numbers. Sources: Clopper & Pearson 1934 for rates; Kairouz, Oh &
Viswanath 2015 for the region of rates that (ε, δ) allows; Steinke, Nasr &
Jagielski 2023 (arXiv 2305.08846), Theorem 5.2, for one run with many canaries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from dp_trainer.audit.findings import AttackPoint

_BISECTIONS = 60
_LARGEST_EPSILON = 50.0


def rate_at_least(hits: int, trials: int, failure: float) -> float:
    """Lower bound on a rate, wrong with probability at most ``failure``; exact for independent trials."""
    return 0.0 if hits == 0 else float(stats.beta.ppf(failure, hits, trials - hits + 1))


def rate_at_most(hits: int, trials: int, failure: float) -> float:
    """Upper bound on a rate, wrong with probability at most ``failure``; exact for independent trials."""
    return 1.0 if hits == trials else float(stats.beta.ppf(1.0 - failure, hits + 1, trials - hits))


def epsilon_from_rates(points: Sequence[AttackPoint], *, delta: float, failure: float) -> float:
    """Largest ε ≥ 0 that the rates rule out, at this δ.

    Guarantee: for an (ε, δ)-private mechanism and independent trials the result exceeds ε with
    probability at most ``failure``, over all points together.

    Args:
        points: Counts of rules fixed before these trials.
        delta: δ.
        failure: Allowed probability of being wrong.
    """
    each = failure / max(1, 2 * len(points))
    best = 0.0
    for point in points:
        false = rate_at_most(point.false_positives, point.outs, each)
        true = rate_at_least(point.true_positives, point.ins, each)
        # "In" answers tell by true positives, "out" answers by true negatives.
        for sure, unsure in ((true, false), (1.0 - false, 1.0 - true)):
            if sure > delta and unsure > 0.0:
                best = max(best, math.log((sure - delta) / unsure))
    return best


def one_run_p_value(*, canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Chance of so many right guesses, or more, if the run were (ε, δ)-private; an upper bound.

    Guarantee: valid for any training algorithm and any way of guessing, given that each of
    ``canaries`` samples was put in by its own fair coin. Abstentions cost nothing.

    Args:
        canaries: Number m of coins.
        guesses: Number r of canaries guessed about.
        right: Number v of right guesses.
        epsilon: ε.
        delta: δ.
    """
    if guesses == 0 or right == 0:
        return 1.0
    success = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, guesses, success))
    # What δ may add: the worst share, over i, of the probability of falling short by at most i.
    shortfalls = np.arange(1, right + 1)
    masses = np.cumsum(stats.binom.pmf(right - shortfalls, guesses, success))
    worst = float(np.max(masses / shortfalls))
    return min(1.0, tail + 2.0 * canaries * delta * worst)


def one_run_epsilon(*, canaries: int, guesses: int, right: int, delta: float, failure: float) -> float:
    """Largest ε ≥ 0 that so many right guesses rule out; too large with probability at most ``failure``."""

    def refuted(epsilon: float) -> bool:
        return (
            one_run_p_value(canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta)
            <= failure
        )

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, _LARGEST_EPSILON
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
