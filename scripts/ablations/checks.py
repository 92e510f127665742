"""Verdicts from numbers: a claim is shown, refuted, or not decidable with what was measured.

A check can come out either way. One that compares runs which should agree also asks for runs which should
not: where those agree too, the setting had no influence and nothing is shown.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.report import table
from scipy import stats

SHOWN, REFUTED, UNDECIDED = "shown", "refuted", "not decidable here"
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim held against numbers.

    Args:
        claim: The claim, specific to what was measured.
        verdict: ``SHOWN``, ``REFUTED`` or ``UNDECIDED``.
        rule: What would have been shown, thresholds included.
        numbers: What decided.
    """

    claim: str
    verdict: str
    rule: str
    numbers: dict[str, float]

    def describe(self) -> dict[str, Any]:
        """All fields for JSON; a number that is not finite becomes None."""
        numbers = {name: value if math.isfinite(value) else None for name, value in self.numbers.items()}
        return {**asdict(self), "numbers": numbers}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its two-sided 95 % confidence limits."""

    mean: float
    low: float
    high: float

    def __format__(self, number: str) -> str:
        number = number or ".4f"
        return f"{self.mean:{number}} ({self.low:{number}} to {self.high:{number}})"


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of independent values.

    Raises:
        ValueError: For fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no interval. Use at least 2 seeds.")
    mean = statistics.fmean(values)
    half = (
        stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    )
    return Interval(mean=mean, low=mean - half, high=mean + half)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Interval of the mean of ``first - second``, values paired by seed."""
    return interval([a - b for a, b in zip(first, second, strict=True)])


def unpaired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Welch's interval of the difference of two means; a point if neither sample varies.

    Raises:
        ValueError: For fewer than two values in either.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("one value has no interval. Use at least 2 seeds.")
    mean = statistics.fmean(first) - statistics.fmean(second)
    # Not scipy's test, which warns about samples without variance: full batches may give such.
    errors = [statistics.variance(values) / len(values) for values in (first, second)]
    if sum(errors) == 0.0:
        return Interval(mean=mean, low=mean, high=mean)
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(values) - 1) for error, values in zip(errors, (first, second), strict=True)
    )
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(sum(errors))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def alike(
    claim: str,
    *,
    same: Sequence[float],
    other: Sequence[float],
    tolerance: float,
    contrast: float,
    what: str,
) -> Check:
    """Whether runs that should agree do, and whether the setting matters elsewhere at all.

    Args:
        claim: The claim.
        same: Differences of pairs that the claim says agree.
        other: Differences of pairs about which it says nothing.
        tolerance: Largest difference that counts as agreement.
        contrast: The largest of ``other`` must be at least this.
        what: What the differences are, for the rule.
    """
    largest = max(same, default=math.nan)
    elsewhere = max(other, default=math.nan)
    if not same:
        verdict = UNDECIDED
    elif not largest <= tolerance:
        verdict = REFUTED
    else:
        verdict = SHOWN if elsewhere >= contrast else UNDECIDED
    return Check(
        claim=claim,
        verdict=verdict,
        rule=f"{what} at most {tolerance:g}; elsewhere at least {contrast:g}",
        numbers={"pairs": len(same), "largest": largest, "elsewhere": elsewhere},
    )


def bounded(claim: str, found: Interval, *, low: float, high: float, what: str) -> Check:
    """Whether a quantity lies in [low, high]: shown if its interval does, refuted if its interval lies outside."""
    inside = low <= found.low and found.high <= high
    outside = found.high < low or found.low > high
    sides = [f"≥ {low:g}"] * math.isfinite(low) + [f"≤ {high:g}"] * math.isfinite(high)
    return Check(
        claim=claim,
        verdict=SHOWN if inside else REFUTED if outside else UNDECIDED,
        rule=f"95 % interval of the {what} {' and '.join(sides)}",
        numbers={"mean": found.mean, "low": found.low, "high": found.high},
    )


def exactly(claim: str, *, holds: bool, rule: str, numbers: dict[str, float]) -> Check:
    """A claim about numbers without chance in them: shown or refuted."""
    return Check(claim=claim, verdict=SHOWN if holds else REFUTED, rule=rule, numbers=numbers)


def falling(claim: str, rows: Sequence[Sequence[float]], *, what: str) -> Check:
    """Whether every row of numbers falls strictly; a row of fewer than two says nothing."""
    steps = [b / a for row in rows for a, b in itertools.pairwise(row)]
    if not steps:
        return Check(
            claim=claim, verdict=UNDECIDED, rule=f"{what}: at least two values", numbers={"comparisons": 0}
        )
    return exactly(
        claim,
        holds=max(steps) < 1,
        rule=f"{what}: every quotient of neighbours below 1",
        numbers={"comparisons": len(steps), "largest quotient": max(steps)},
    )


def checks_table(checks: Sequence[Check]) -> str:
    """One row a check."""
    rows = [
        (
            check.claim,
            f"**{check.verdict}**",
            ", ".join(f"{name} {value:.4g}" for name, value in check.numbers.items()),
            check.rule,
        )
        for check in checks
    ]
    return table(("claim", "verdict", "numbers", "shown if"), rows)
