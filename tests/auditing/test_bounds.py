"""Bounds of the audit against slow twins, and their coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from dp_trainer.audit.bounds import (
    epsilon_from_rates,
    one_run_epsilon,
    one_run_p_value,
    rate_at_least,
    rate_at_most,
)
from dp_trainer.audit.curves import ClaimedCurve, when_drawn
from dp_trainer.audit.findings import AttackPoint
from dp_trainer.audit.one_run import evidence
from dp_trainer.privacy.accounting import Mechanism
from dp_trainer.privacy.gaussian import gaussian_power

pytestmark = pytest.mark.audit


@pytest.mark.parametrize(("hits", "trials"), [(0, 20), (3, 20), (19, 20), (20, 20)])
def test_rates_are_clopper_pearson(hits, trials):
    interval = stats.binomtest(hits, trials).proportion_ci(0.9, method="exact")
    assert rate_at_least(hits, trials, 0.05) == pytest.approx(interval.low)
    assert rate_at_most(hits, trials, 0.05) == pytest.approx(interval.high)


def point(false, outs, true, ins):
    return AttackPoint(
        setting="",
        false_positives=false,
        outs=outs,
        true_positives=true,
        ins=ins,
        largest_false_positive_rate=1.0,
        smallest_true_positive_rate=0.0,
        allowed_true_positive_rate=1.0,
    )


def test_epsilon_from_rates_by_hand_and_in_both_directions():
    true, false = rate_at_least(90, 100, 0.025), rate_at_most(10, 100, 0.025)
    by_hand = math.log((true - 1e-3) / false)
    assert epsilon_from_rates([point(10, 100, 90, 100)], delta=1e-3, failure=0.05) == pytest.approx(by_hand)
    # "Out" answers alone: nobody that was in is missed, and some that were out are found.
    sure = epsilon_from_rates([point(500, 1000, 1000, 1000)], delta=0.0, failure=0.05)
    assert sure == pytest.approx(
        math.log((1 - rate_at_most(500, 1000, 0.025)) / (1 - rate_at_least(1000, 1000, 0.025)))
    )
    assert sure > 4
    assert epsilon_from_rates([point(50, 100, 50, 100)], delta=0.0, failure=0.05) == 0


def slow_p_value(m, r, v, epsilon, delta):
    """The theorem as a loop over shortfalls."""
    success = math.exp(epsilon) / (1 + math.exp(epsilon))
    masses = [math.comb(r, k) * success**k * (1 - success) ** (r - k) for k in range(r + 1)]
    worst = max(sum(masses[v - i : v]) / i for i in range(1, v + 1))
    return min(1.0, sum(masses[v:]) + 2 * m * delta * worst)


@pytest.mark.parametrize(
    "case", [(50, 50, 40, 1.0, 0.0), (50, 20, 18, 0.5, 1e-3), (60, 30, 30, 3.0, 1e-5), (9, 5, 1, 0.0, 0.1)]
)
def test_one_run_p_value_is_the_theorem(case):
    m, r, v, epsilon, delta = case
    fast = one_run_p_value(canaries=m, guesses=r, right=v, epsilon=epsilon, delta=delta)
    assert fast == pytest.approx(slow_p_value(*case), rel=1e-9)


def test_one_run_bound_covers_randomized_response():
    """The mechanism for which the theorem is tight: bounds exceed its ε at most as often as they may."""
    generator, epsilon, wrong = np.random.default_rng(0), 1.5, 0
    success = 1 / (1 + math.exp(-epsilon))
    bounds = [
        one_run_epsilon(canaries=200, guesses=200, right=int(right), delta=0.0, failure=0.05)
        for right in generator.binomial(200, success, size=400)
    ]
    wrong = sum(bound > epsilon for bound in bounds)
    assert wrong <= stats.binom.isf(1e-4, 400, 0.05)
    # Tight: a bound that never came near would pass, too.
    assert np.median(bounds) > 0.7 * epsilon


def test_evidence_is_the_log_likelihood_ratio():
    entries = np.random.default_rng(0).normal(size=(3, 5))
    drawn = stats.norm.pdf(entries, loc=0.8)
    out = stats.norm.pdf(entries)
    np.testing.assert_allclose(
        evidence(entries, q=0.3, distance=0.8), np.log((0.7 * out + 0.3 * drawn) / out).sum(0), rtol=1e-10
    )
    np.testing.assert_allclose(evidence(entries, q=1.0, distance=0.8), np.log(drawn / out).sum(0), rtol=1e-9)


def mechanism(**changes):
    settings = {"dataset_size": 600, "sampling": "poisson", "sampling_probability": 0.25, "batch_cap": 600}
    return Mechanism(**{**settings, "noise_multiplier": 1.0, **changes})


def test_curve_is_that_of_the_noise_where_the_canary_is_drawn():
    curve = ClaimedCurve(when_drawn(mechanism()), 1)
    for rate in (0.003, 0.2, 0.9):
        assert curve.allowed(rate) == pytest.approx(gaussian_power(1.0, rate))
    assert curve.allowed(1.0) == 1.0


def test_curve_bounds_the_best_attack_on_a_sampled_release():
    """One release with q = 1/4: the likelihood-ratio attack reaches the curve and stays under it."""
    curve = ClaimedCurve(mechanism(), 1)
    for threshold in (0.5, 1.5, 2.5):
        false = stats.norm.sf(threshold)
        true = 0.75 * false + 0.25 * stats.norm.sf(threshold - 1)
        assert true <= curve.allowed(false) <= true + 0.01
