"""What (ε, δ) means for somebody who attacks: bounds on true- and false-positive rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dp_trainer.privacy.accounting import EpsilonCurve, Mechanism, rounding_allowance
from dp_trainer.privacy.gaussian import gaussian_power

ATTACK_RATES = (0.001, 0.01, 0.1)
_CELLS = 5_000


def attack_rates(
    mechanism: Mechanism, steps: int, *, false_positive_rates: Sequence[float] = ATTACK_RATES
) -> Mapping[float, float]:
    """What (ε, δ) means for an attack: the best possible true-positive rates.

    Guarantee: no test of whether one given sample was used (or one user; or, where the relation is
    replacement, which of two given ones was), wrong on unused ones at most at the given rate, is
    right on used ones more often than this. It sees every noised update and knows all others.

    Args:
        mechanism: The release that is repeated.
        steps: Number of releases.
        false_positive_rates: Allowed rates of false alarms, each in (0, 1).

    Returns:
        For each false-positive rate an upper bound on the true-positive rate.
    """
    if steps == 0:
        return {rate: rate for rate in false_positive_rates}
    if mechanism.noise_multiplier == 0.0:
        return dict.fromkeys(false_positive_rates, 1.0)
    if mechanism.is_unsampled:
        return {rate: gaussian_power(mechanism.distance(steps), rate) for rate in false_positive_rates}
    # Reading off thousands of losses is slow on a fine grid, and a bound to three digits is all that is said.
    curve = EpsilonCurve(mechanism, horizon=steps, cells=_CELLS)
    if curve.is_out_of_reach:
        return dict.fromkeys(false_positive_rates, 1.0)
    composed = curve.composed(steps)
    # For every loss bound the power is at most δ(loss) + exp(loss) · rate, so the smallest such value bounds it.
    losses = np.linspace(-10.0, 40.0, 2001)
    deltas = np.asarray(composed.get_delta_for_epsilon(losses)) + rounding_allowance(steps)
    return {rate: float(min(1.0, np.min(deltas + np.exp(losses) * rate))) for rate in false_positive_rates}
