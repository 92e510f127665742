"""One release's distribution of privacy losses on a grid, and the grid.

Guarantee: the distribution is pessimistic. Composed any number of times, it never shows a smaller ε than the
mechanism has, up to ``rounding_allowance``.

dp_accounting rounds and composes. What it needs at each grid point, δ as a function of ε, is worked out
here for all points at once: its own loop in Python took nine tenths of the time. A test compares the two.

Notation: P and Q are the outputs of one release along the direction in which the neighbours differ, noise
std σ, sampling probability q, distance 1. Removing: P = (1-q) N(0) + q N(-1), Q = N(0). Adding: P and Q
change places. Replacing: P = (1-q) N(0) + q N(-1), Q = (1-q) N(0) + q N(+1).

**The cap.** Poisson sampling that keeps at most ``batch_cap`` samples is not quite
Poisson: where the cap acts, adding a sample may push another one out. Write w for
the probability that the cap is reached by the others, P[Bin(N, q) ≥ cap]. Given
that, the sample gets in with probability at most q, in place of one whose
clipped gradient also has norm R, so the sum moves by up to 2R. One step is hence
dominated by: with probability w a Poisson-sampled Gaussian of sensitivity 2R,
else one of sensitivity R. With replaced samples the same holds of the two
neighbours' sums, each against the sum without either.

Source: connect-the-dots rounding of Doroshenko et al. 2022 (arXiv 2207.04380), as in dp_accounting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from dp_accounting.pld import common as pld_common
from dp_accounting.pld import pld_pmf, privacy_loss_distribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray
from scipy import fft  # type: ignore[import-untyped]
from scipy.special import log_ndtr, ndtr, ndtri_exp  # type: ignore[import-untyped]

from dp_trainer.privacy.mechanism import Mechanism

Losses = NDArray[np.float64]

_LOG_TAIL = -50.0
# What a composition may cut off, as in dp_accounting.
_TAIL_MASS = 1e-15
# Where Chernoff's bound says how far a composition reaches: fewer places than in dp_accounting take less time.
_CHERNOFF_ORDERS = np.outer((-1.0, 1.0), (0.5, 1.0, 1.5, 2.5, 4.0, 6.0, 9.0, 14.0, 20.0)).ravel()
_CELLS_IN_SPREAD = 2500.0
_SMALLEST_MIXTURE_WEIGHT = 1e-17


HAS_EXTENDED_PRECISION = bool(np.finfo(np.longdouble).eps < 1e-18)


def rounding_allowance(steps: int, *, extended: bool | None = None) -> float:
    """More than rounding can take from δ in a composition of so many steps.

    Raising the transform to the power of k multiplies its rounding by k. In double precision, compositions of
    k = 2·10^4 to 10^6 steps were found to lose up to 1.7e-16·k beside extended precision, whose own unit is
    2000 times smaller. Rounding of one step's δ took up to 5e-20·k beside 40 digits.

    Args:
        steps: Steps composed.
        extended: Whether they were composed in extended precision; if the processor has it, if not given.
    """
    extended = HAS_EXTENDED_PRECISION if extended is None else extended
    return 1e-14 + (1e-18 if extended else 1e-15) * steps


class ExtendedPmf(pld_pmf.DensePLDPmf):  # type: ignore[misc]
    """A distribution of losses that composes with itself as in dp_accounting, in extended precision."""

    @classmethod
    def of(cls, pmf: pld_pmf.PLDPmf) -> ExtendedPmf:
        """Returns the same distribution."""
        dense = pmf.to_dense_pmf()
        return cls(
            dense._discretization,
            dense._lower_loss,
            dense._probs,
            dense._infinity_mass,
            dense._pessimistic_estimate,
        )

    def self_compose(self, num_times: int, tail_mass_truncation: float = _TAIL_MASS) -> pld_pmf.DensePLDPmf:
        """Returns the distribution of so many independent losses; what tails lose counts as infinite loss."""
        lowest, highest = pld_common.compute_self_convolve_bounds(
            self._probs, num_times, tail_mass_truncation, orders=_CHERNOFF_ORDERS / len(self._probs)
        )
        size = highest - lowest + 1
        period = fft.next_fast_len(max(size, len(self._probs)))
        transform = fft.rfft(np.asarray(self._probs, dtype=np.longdouble), period)
        # Most frequencies vanish in the power; leaving them out saves most of its time and less than 1e-30 each.
        felt = np.abs(transform) > math.exp(-70.0 / num_times)
        power = np.where(felt, transform, 0.0)
        power[felt] **= num_times
        # It wraps around, so what lies below ``lowest`` comes last.
        probabilities = np.roll(fft.irfft(power, period), -lowest)[:size]
        infinite = tail_mass_truncation - math.expm1(num_times * math.log1p(-self._infinity_mass))
        return ExtendedPmf(
            self._discretization,
            self._lower_loss * num_times + lowest,
            probabilities.astype(np.float64),
            infinite,
            self._pessimistic_estimate,
        )

    def get_epsilon_for_delta(self, delta: float) -> float:
        """Returns the smallest ε whose hockey-stick divergence is at most δ, as in dp_accounting but without its loop."""
        losses = (np.arange(self.size) + self._lower_loss)[::-1] * self._discretization
        probabilities = self._probs[::-1]
        with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
            # Of the losses above each one: their probability, and the same under the other output.
            above = self._infinity_mass + np.concatenate([[0.0], np.cumsum(probabilities)])
            other = np.concatenate([[0.0], np.cumsum(probabilities * np.exp(-losses))])
            candidates = np.log((above - delta) / other)
        if self._infinity_mass > delta:
            return math.inf
        # Losses so large that the other output's probabilities vanish: the loss itself is a bound.
        vanishing = np.flatnonzero((above[1:] >= delta) & (other[1:] == 0.0))
        if len(vanishing):
            return max(0.0, float(losses[vanishing[0]]))
        # An ε between two neighbouring losses is the one that the upper of them implies.
        reached = np.flatnonzero((above[:-1] > delta) & (other[:-1] > 0.0) & (candidates[:-1] >= losses))
        last = int(reached[0]) if len(reached) else self.size
        return max(0.0, float(candidates[last])) if above[last] > other[last] + delta else 0.0


def composed(
    one_step: Sequence[pld_pmf.PLDPmf], steps: int, *, extended: bool | None = None
) -> privacy_loss_distribution.PrivacyLossDistribution:
    """The distribution of so many steps' losses.

    Args:
        one_step: What ``one_step_distributions`` returned.
        steps: At least 1.
        extended: Whether to compose in extended precision; if the processor has it, if not given.
    """
    extended = HAS_EXTENDED_PRECISION if extended is None else extended
    if steps == 1:
        return privacy_loss_distribution.PrivacyLossDistribution(*one_step)
    pmfs = [ExtendedPmf.of(pmf) if extended else pmf for pmf in one_step]
    return privacy_loss_distribution.PrivacyLossDistribution(*(pmf.self_compose(steps) for pmf in pmfs))


def grid_width(mechanism: Mechanism, horizon: int, cells: int) -> float:
    """Cell width for this accuracy; only costs accuracy and time.

    Rounding adds to each step's variance, so cells must be narrow beside the standard deviation of one step's loss,
    and beside the range of losses where one step decides. They must not be so narrow that all
    steps together have too many, nor that the rounding of differences between neighbouring cells adds up.

    Args:
        mechanism: The release.
        horizon: Most steps that will be composed.
        cells: About this many cells cover one step's range of losses, up to four times as many if they must.
    """
    if mechanism.noise_multiplier == 0.0:
        return 1.0
    q, sigma = mechanism.sampling_probability, mechanism.noise_multiplier / mechanism.shift
    one_step = _range_of_losses(q, sigma, _LOG_TAIL)
    if mechanism.cap_probability > 0.0:
        one_step = max(one_step, _range_of_losses(q, sigma / 2.0, _log_tail(mechanism.cap_probability)))
    exponent = min(700.0, 1.0 / sigma**2)
    mean_loss = min(0.5 / sigma**2, 0.5 * math.log1p(q**2 * math.expm1(exponent)))
    spread = math.sqrt(2.0 * mean_loss)
    all_steps = 2.0 * (horizon * mean_loss + 8.0 * math.sqrt(horizon) * spread)
    wanted = min(one_step / cells, spread * _CELLS_IN_SPREAD / cells)
    differences = math.sqrt(horizon * min(one_step, 20.0 * spread) * 1e-14)
    return max(wanted, one_step / (4 * cells), all_steps / (6 * cells), differences, 1e-9)


def one_step_distributions(mechanism: Mechanism, grid: float) -> list[pld_pmf.PLDPmf]:
    """The mixture of the module's text: sensitivity R, or with probability w sensitivity 2R.

    Args:
        mechanism: The release; its noise must not be 0.
        grid: Width of a cell.

    Returns:
        The losses of removing and of adding a sample, or those of replacing one.
    """
    sigma, q = mechanism.noise_multiplier, mechanism.sampling_probability
    plain = _sampled_gaussian(sigma, q, grid, replaces=mechanism.replaces, log_tail=_LOG_TAIL)
    weight = mechanism.cap_probability
    if weight == 0.0:
        return plain
    weight = max(weight, _SMALLEST_MIXTURE_WEIGHT)
    pushed = _sampled_gaussian(sigma / 2.0, q, grid, replaces=mechanism.replaces, log_tail=_log_tail(weight))
    return [often.compute_mixture(usual, weight) for often, usual in zip(pushed, plain, strict=True)]


def _log_tail(weight: float) -> float:
    # Tails of a rare event may be cut earlier; what is cut counts as infinite loss.
    return max(_LOG_TAIL, math.log(1e-18 / max(weight, _SMALLEST_MIXTURE_WEIGHT)))


def _range_of_losses(q: float, sigma: float, log_tail: float) -> float:
    tail = -float(ndtri_exp(log_tail - math.log(2.0)))
    largest = 0.5 / sigma**2 + tail / sigma
    return largest + math.log(q + (1.0 - q) * math.exp(-largest)) + (largest if q == 1.0 else 0.0)


def sampled_gaussian_deltas(losses: Losses, sigma: float, q: float, adjacency: AdjacencyType) -> Losses:
    """Hockey-stick divergences of P from Q at these losses; each in [0, 1], shape as given.

    δ is P(x) - e^loss·Q(x) at the threshold x where the loss of an output equals the given one. That x maximises
    it, so rounding in x is felt in second order only.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if adjacency is AdjacencyType.REPLACE:
            x = _threshold_of_replacing(losses, sigma, q)
            deltas = _mixed_cdf(x, 1.0, sigma, q) - np.exp(losses + _log_mixed_cdf(x, -1.0, sigma, q))
        elif adjacency is AdjacencyType.REMOVE:
            unsampled = _unsampled_loss(losses, q)
            x = -0.5 - sigma**2 * unsampled
            deltas = _mixed_cdf(x, 1.0, sigma, q) - np.exp(losses + log_ndtr(x / sigma))
            # Below log(1 - q) every output has a larger loss.
            deltas = np.where(np.isnan(unsampled) | np.isneginf(unsampled), -np.expm1(losses), deltas)
        else:
            unsampled = -_unsampled_loss(-losses, q)
            x = 0.5 - sigma**2 * unsampled
            deltas = ndtr(x / sigma) - np.exp(losses + _log_mixed_cdf(x, -1.0, sigma, q))
            deltas = np.where(np.isnan(unsampled) | np.isposinf(unsampled), 0.0, deltas)
    return np.asarray(np.clip(deltas, 0.0, 1.0), dtype=np.float64)


def _unsampled_loss(losses: Losses, q: float) -> Losses:
    """log(1 + (e^loss - 1) / q); NaN where no output has so small a loss."""
    if q == 1.0:
        return losses
    # Two forms of one value: the first exact near 0, the second where the exponential would overflow.
    near = np.log1p(np.expm1(np.minimum(losses, 1.0)) / q)
    far = losses + np.log1p(-(1.0 - q) * np.exp(-np.maximum(losses, 1.0))) - math.log(q)
    return np.where(losses <= 1.0, near, far)


def _threshold_of_replacing(losses: Losses, sigma: float, q: float) -> Losses:
    """Solves log P(x)/Q(x) = loss: a quadratic in u = e^(-x/σ²), in logarithms; odd in the loss."""
    size = np.abs(losses)
    log_a = np.log1p(-q) + size + np.log(-np.expm1(-size)) if q < 1.0 else np.full_like(losses, -np.inf)
    log_qc = math.log(q) - 0.5 / sigma**2
    log_root = 0.5 * np.logaddexp(2.0 * log_a, 2.0 * (math.log(2.0) + log_qc + size / 2.0))
    log_u = np.logaddexp(log_a, log_root) - math.log(2.0) - log_qc
    return -np.sign(losses) * sigma**2 * log_u


def _mixed_cdf(x: Losses, shift: float, sigma: float, q: float) -> Losses:
    return np.asarray((1.0 - q) * ndtr(x / sigma) + q * ndtr((x + shift) / sigma))


def _log_mixed_cdf(x: Losses, shift: float, sigma: float, q: float) -> Losses:
    sampled = math.log(q) + log_ndtr((x + shift) / sigma)
    return np.asarray(sampled if q == 1.0 else np.logaddexp(math.log1p(-q) + log_ndtr(x / sigma), sampled))


def _sampled_gaussian(
    sigma: float, q: float, grid: float, *, replaces: bool, log_tail: float
) -> list[pld_pmf.PLDPmf]:
    kinds = (AdjacencyType.REPLACE,) if replaces else (AdjacencyType.REMOVE, AdjacencyType.ADD)
    return [_rounded_losses(sigma, q, grid, kind, log_tail) for kind in kinds]


def _rounded_losses(
    sigma: float, q: float, grid: float, adjacency: AdjacencyType, log_tail: float
) -> pld_pmf.PLDPmf:
    bounds = GaussianPrivacyLoss(
        sigma, sampling_prob=q, adjacency_type=adjacency, log_mass_truncation_bound=log_tail
    ).connect_dots_bounds()
    lowest, highest = math.floor(bounds.epsilon_lower / grid), math.ceil(bounds.epsilon_upper / grid)
    losses = np.arange(lowest, highest + 1) * grid
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
        grid, lowest, highest, sampled_gaussian_deltas(losses, sigma, q, adjacency)
    )
