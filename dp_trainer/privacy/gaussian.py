"""Closed forms for the Gaussian mechanism without sampling.

T releases of a sum with noise multiplier σ and no sampling are together one
Gaussian mechanism with μ = √T / σ: the distance between the means of the two
outputs in standard deviations. For it the exact trade-off is known, so no
numerical composition is needed.

Source: Balle & Wang 2018, Theorem 8; Dong, Roth & Su 2019 for the power.
"""

from __future__ import annotations

import math

from scipy.special import log_ndtr, ndtr, ndtri  # type: ignore[import-untyped]

_BISECTIONS = 200


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Smallest δ for which a Gaussian mechanism at distance μ is (ε, δ)-private; exact.

    Args:
        mu: Distance of the means in standard deviations, not negative.
        epsilon: Privacy loss, not negative.
    """
    if mu == 0.0:
        return 0.0
    below = log_ndtr(mu / 2.0 - epsilon / mu)
    above = epsilon + log_ndtr(-mu / 2.0 - epsilon / mu)
    return max(0.0, -math.exp(below) * math.expm1(min(0.0, above - below)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest ε ≥ 0 for which the mechanism is (ε, δ)-private, rounded up.

    Args:
        mu: Distance of the means in standard deviations; infinite means no noise.
        delta: Allowed δ, in (0, 1).
    """
    if math.isinf(mu):
        return math.inf
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2.0 * high
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def gaussian_distance(epsilon: float, delta: float) -> float:
    """Largest μ at which a Gaussian mechanism is (ε, δ)-private, rounded down.

    Args:
        epsilon: Privacy loss, not negative.
        delta: Allowed δ, in (0, 1).
    """
    low, high = 0.0, 1.0
    while gaussian_delta(high, epsilon) <= delta:
        low, high = high, 2.0 * high
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if gaussian_delta(middle, epsilon) <= delta else (low, middle)
    return low


def gaussian_power(mu: float, false_positive_rate: float) -> float:
    """True-positive rate of the best test between the two outputs; exact.

    Args:
        mu: Distance of the means in standard deviations.
        false_positive_rate: Allowed rate of false alarms, in (0, 1).
    """
    return float(ndtr(ndtri(false_positive_rate) + mu))
