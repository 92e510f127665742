"""From a privacy target to the noise multiplier that meets it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from dp_trainer.errors import ConfigurationError, PrivacyBudgetError
from dp_trainer.privacy.accounting import (
    FINE_CELLS,
    EpsilonCurve,
    check_supported,
    renyi_epsilon_without_cap,
)
from dp_trainer.privacy.gaussian import gaussian_distance
from dp_trainer.privacy.mechanism import Mechanism, check_delta

SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 0.05, 1e6
# Grid cells of a search's first, rough part.
ROUGH_CELLS = 4_000
_FEW_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)


def calibrate_noise(
    mechanism: Mechanism, *, target_epsilon: float, target_delta: float, steps: int, accountant: str = "pld"
) -> float:
    """The smallest noise multiplier that keeps a whole run within (ε, δ).

    Guarantee: the verified ε of the returned value is at most ``target_epsilon``, and
    the value is within half a percent of the smallest such one (but never
    below 0.05). RDP brackets it, a rough grid narrows it, the fine grid finds and verifies it.

    Args:
        mechanism: The release that is repeated; its own noise multiplier is not looked at.
        target_epsilon: ε of the run, positive.
        target_delta: δ of the run.
        steps: Releases in the run.
        accountant: Which accountant decides.

    Raises:
        ConfigurationError: If an argument is out of range.
        PrivacyBudgetError: If no noise multiplier reaches the target.
    """
    check_target("calibrate_noise", target_epsilon, target_delta)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigurationError(f"calibrate_noise: steps is {steps!r}. It must be a positive whole number.")

    def noised(noise_multiplier: float) -> Mechanism:
        return replace(mechanism, noise_multiplier=noise_multiplier)

    def spent(noise_multiplier: float, cells: int) -> float:
        curve = EpsilonCurve(noised(noise_multiplier), horizon=steps, accountant=accountant, cells=cells)
        return curve.epsilon(steps, target_delta)

    check_supported(mechanism, accountant)
    if mechanism.is_unsampled and accountant != "rdp":
        # The distance of the means is inversely proportional to the noise.
        distance = gaussian_distance(target_epsilon, target_delta)
        found = max(SMALLEST_NOISE_MULTIPLIER, noised(1.0).distance(steps) / distance)
        # Rounding in σ → μ → ε may land a hair above the target.
        hair = 1e-9
        while spent(found, FINE_CELLS) > target_epsilon:
            found, hair = found * (1.0 + hair), 2.0 * hair
        if found > LARGEST_NOISE_MULTIPLIER:
            raise _unreachable(target_epsilon)
        return found
    start = _renyi_guess(
        lambda value: renyi_epsilon_without_cap(noised(value), steps, target_delta, _FEW_ORDERS),
        target_epsilon,
    )
    rough, slope = _smallest_within(lambda value: spent(value, ROUGH_CELLS), target_epsilon, start)
    return _polished(lambda value: spent(value, FINE_CELLS), target_epsilon, rough, slope)


def check_target(place: str, target_epsilon: float, target_delta: float) -> None:
    """Checks that a target is one that a search can aim at.

    Raises:
        ConfigurationError: If ε is not positive and finite, or δ not in [1e-10, 1).
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0.0):
        raise ConfigurationError(f"{place}: target_epsilon is {target_epsilon!r}. It must be positive.")
    check_delta(target_delta, place)


def _renyi_guess(spent: Callable[[float], float], target: float) -> float:
    low, high = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(1000.0)
    while high - low > 0.02:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if spent(math.exp(middle)) <= target else (middle, high)
    return math.exp(high)


def _polished(spent: Callable[[float], float], target: float, start: float, slope: float) -> float:
    """The smallest noise multiplier on target, to 0.12 % or to 0.2 % of the target, in few evaluations.

    Args:
        spent: ε of a noise multiplier; decreases.
        target: ε wanted.
        start: Where to begin.
        slope: How many times faster than the noise grows ε falls there, about.
    """
    low, high, at_low, at_high = 0.0, math.inf, math.inf, 0.0
    guess, last, at_last = start, start, math.inf
    while True:
        at_guess = spent(guess)
        if at_guess <= target:
            high, at_high = guess, at_guess
        else:
            low, at_low = guess, at_guess
        if high <= max(1.0012 * low, SMALLEST_NOISE_MULTIPLIER) or 0.998 * target <= at_high:
            return high
        known = 0.0 < at_high < at_low < math.inf
        if 0.0 < at_guess < math.inf and 0.0 < at_last < math.inf and at_guess != at_last:
            # Nearly a straight line in log-log, through the last two.
            slope = max(0.3, math.log(at_last / at_guess) / math.log(guess / last))
        last, at_last = guess, at_guess
        # A little to the safe side, so that the next one is on target.
        factor = (at_guess / (0.9996 * target)) ** (1.0 / slope) if 0.0 < at_guess < math.inf else 1.1
        guess *= min(max(factor if at_guess > 0.0 else 1 / 1.1, 0.8), 1.25)
        if low > 0.0 and math.isfinite(high):
            guess = min(max(guess, low * 1.0005), high / 1.0005) if known else math.sqrt(low * high)
        guess = max(guess, SMALLEST_NOISE_MULTIPLIER)
        if guess > LARGEST_NOISE_MULTIPLIER:
            raise _unreachable(target)


def _smallest_within(spent: Callable[[float], float], target: float, start: float) -> tuple[float, float]:
    """A noise multiplier within 3 % of the smallest whose ε is on target, and how fast ε falls; ``spent`` decreases."""
    low = high = start
    at_low = at_high = spent(start)
    factor = 1.1
    while at_high > target:
        low, at_low = high, at_high
        high, factor = high * factor, factor**2
        if high > LARGEST_NOISE_MULTIPLIER:
            raise _unreachable(target)
        at_high = spent(high)
    factor = 1.1
    while at_low <= target:
        high, at_high = low, at_low
        if low == SMALLEST_NOISE_MULTIPLIER:
            return low, 1.0
        low, factor = max(SMALLEST_NOISE_MULTIPLIER, low / factor), factor**2
        at_low = spent(low)
    while high / low > 1.03:
        guess = math.sqrt(low * high)
        if 0.0 < at_high < at_low < math.inf:
            # Nearly a straight line in log-log, so interpolation lands close; the clamp closes the other side.
            share = math.log(at_low / target) / math.log(at_low / at_high)
            guess = low * (high / low) ** share
        guess = min(max(guess, low * 1.01), high / 1.01)
        at_guess = spent(guess)
        if at_guess <= target:
            high, at_high = guess, at_guess
        else:
            low, at_low = guess, at_guess
    slope = 1.0
    if 0.0 < at_high < at_low < math.inf and high > low:
        slope = max(0.5, math.log(at_low / at_high) / math.log(high / low))
    return high, slope


def _unreachable(target_epsilon: float) -> PrivacyBudgetError:
    return PrivacyBudgetError(
        f"No noise multiplier up to {LARGEST_NOISE_MULTIPLIER:g} keeps this run within epsilon {target_epsilon:g}. "
        "Raise target_epsilon or target_delta, take fewer steps or smaller batches, or raise batch_cap."
    )
