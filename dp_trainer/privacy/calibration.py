"""From a privacy target to the noise multiplier that meets it."""

from __future__ import annotations

import math
from collections.abc import Callable

from dp_trainer.errors import ConfigurationError, PrivacyBudgetError
from dp_trainer.privacy.accounting import (
    COARSE_CELLS,
    FINE_CELLS,
    EpsilonCurve,
    Mechanism,
    check_delta,
    renyi_epsilon_without_cap,
)
from dp_trainer.privacy.gaussian import gaussian_distance

SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 0.05, 1e6
_FEW_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
_WORTH_REFINING = 0.997


def calibrate_noise(
    *,
    target_epsilon: float,
    target_delta: float,
    steps: int,
    sampling_probability: float,
    dataset_size: int,
    sampling: str,
    batch_cap: int,
    accountant: str = "pld",
) -> float:
    """The smallest noise multiplier that keeps a whole run within (ε, δ).

    Guarantee: the verified ε of the returned value is at most ``target_epsilon``, and
    the value is within half a percent of the smallest such one (but never
    below 0.05). RDP brackets it, a coarse grid narrows it, the fine grid verifies it.

    Args:
        target_epsilon: ε of the run, positive.
        target_delta: δ of the run.
        steps: Releases in the run.
        sampling_probability: q, in (0, 1].
        dataset_size: Public number of samples.
        sampling: ``"poisson"`` or ``"full_batch"``.
        batch_cap: Largest logical batch.
        accountant: Which accountant decides.

    Raises:
        ConfigurationError: If an argument is out of range.
        PrivacyBudgetError: If no noise multiplier reaches the target.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0.0):
        raise ConfigurationError(
            f"calibrate_noise: target_epsilon is {target_epsilon!r}. It must be positive."
        )
    check_delta(target_delta, "calibrate_noise")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigurationError(f"calibrate_noise: steps is {steps!r}. It must be a positive whole number.")

    def mechanism(noise_multiplier: float) -> Mechanism:
        return Mechanism(
            dataset_size=dataset_size,
            sampling=sampling,
            sampling_probability=sampling_probability,
            batch_cap=batch_cap,
            noise_multiplier=noise_multiplier,
        )

    def spent(noise_multiplier: float, cells: int = COARSE_CELLS) -> float:
        curve = EpsilonCurve(mechanism(noise_multiplier), horizon=steps, accountant=accountant, cells=cells)
        return curve.epsilon(steps, target_delta)

    if mechanism(1.0).is_unsampled and accountant != "rdp":
        found = max(
            SMALLEST_NOISE_MULTIPLIER, math.sqrt(steps) / gaussian_distance(target_epsilon, target_delta)
        )
        # Rounding in σ → μ → ε may land a hair above the target.
        return found if spent(found) <= target_epsilon else found * (1.0 + 1e-9)
    start = _renyi_guess(
        lambda value: renyi_epsilon_without_cap(mechanism(value), steps, target_delta, _FEW_ORDERS),
        target_epsilon,
    )
    found = _smallest_within(spent, target_epsilon, start)
    judged = spent(found, FINE_CELLS)
    if 0.0 < judged < _WORTH_REFINING * target_epsilon:
        # The coarse grid asked for too much noise: search again for what it shows when the fine one is on target.
        leaner = _smallest_within(spent, target_epsilon * spent(found) / judged, found)
        if spent(leaner, FINE_CELLS) <= target_epsilon:
            return leaner
    while judged > target_epsilon:
        found *= 1.001
        if found > LARGEST_NOISE_MULTIPLIER:
            raise _unreachable(target_epsilon)
        judged = spent(found, FINE_CELLS)
    return found


def _renyi_guess(spent: Callable[[float], float], target: float) -> float:
    low, high = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(1000.0)
    while high - low > 0.02:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if spent(math.exp(middle)) <= target else (middle, high)
    return math.exp(high)


def _smallest_within(spent: Callable[[float], float], target: float, start: float) -> float:
    """A noise multiplier within 0.2 % of the smallest whose ε is on target; ``spent`` decreases."""
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
            return low
        low, factor = max(SMALLEST_NOISE_MULTIPLIER, low / factor), factor**2
        at_low = spent(low)
    while high / low > 1.002:
        guess = math.sqrt(low * high)
        if 0.0 < at_high < at_low < math.inf:
            # Nearly a straight line in log-log, so interpolation lands close; the clamp closes the other side.
            share = math.log(at_low / target) / math.log(at_low / at_high)
            guess = low * (high / low) ** share
        guess = min(max(guess, low * 1.0008), high / 1.0008)
        at_guess = spent(guess)
        if at_guess <= target:
            high, at_high = guess, at_guess
        else:
            low, at_low = guess, at_guess
    return high


def _unreachable(target_epsilon: float) -> PrivacyBudgetError:
    return PrivacyBudgetError(
        f"No noise multiplier up to {LARGEST_NOISE_MULTIPLIER:g} keeps this run within epsilon {target_epsilon:g}. "
        "Raise target_epsilon or target_delta, take fewer steps or smaller batches, or raise batch_cap."
    )
