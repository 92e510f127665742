"""ε against independent computations: integrals, enumeration, closed forms, other accountants."""

import itertools
import math
import subprocess
import sys
import time
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant, pld_pmf
from scipy import stats

from dp_trainer.errors import ConfigurationError, PrivacyBudgetError
from dp_trainer.privacy import loss_distribution
from dp_trainer.privacy.accounting import (
    COARSE_CELLS,
    FINE_CELLS,
    EpsilonCurve,
    Mechanism,
    default_batch_cap,
    epsilon,
    most_steps,
    rounded_up,
)
from dp_trainer.privacy.attack import attack_rates
from dp_trainer.privacy.calibration import calibrate_noise
from dp_trainer.privacy.gaussian import gaussian_delta, gaussian_distance, gaussian_epsilon, gaussian_power
from dp_trainer.privacy.loss_distribution import (
    HAS_EXTENDED_PRECISION,
    ExtendedPmf,
    composed,
    grid_width,
    one_step_distributions,
    rounding_allowance,
)


def poisson(size, batch, sigma, cap=None):
    return Mechanism(
        dataset_size=size,
        sampling="poisson",
        sampling_probability=batch / size,
        batch_cap=size + 1 if cap is None else cap,
        noise_multiplier=sigma,
    )


def full_batch(sigma, size=100):
    return Mechanism(
        dataset_size=size,
        sampling="full_batch",
        sampling_probability=1.0,
        batch_cap=size,
        noise_multiplier=sigma,
    )


def hockey_stick(p, q, eps, width):
    """∫ max(0, p - e^ε q) by a fine sum; densities on the real line."""
    x = np.linspace(-width, width, 400_001)
    return float(np.maximum(0.0, p(x) - math.exp(eps) * q(x)).sum() * (x[1] - x[0]))


def one_step_deltas(mechanism, losses):
    composed = EpsilonCurve(mechanism, horizon=1, cells=20_000).composed(1)
    return np.asarray(composed.get_delta_for_epsilon(losses))


# One step.


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 0.8), (0.1, 0.6), (0.5, 2.0)])
def test_one_step_agrees_with_the_integral(q, sigma):
    def without(x):
        return stats.norm.pdf(x, 0, sigma)

    def with_sample(x):
        return (1 - q) * stats.norm.pdf(x, 0, sigma) + q * stats.norm.pdf(x, 1, sigma)

    losses = np.array([0.05, 0.3, 1.0, 2.0])
    found = one_step_deltas(poisson(1000, round(1000 * q), sigma), losses)
    for loss, delta in zip(losses, found, strict=True):
        exact = max(
            hockey_stick(with_sample, without, loss, 12 * sigma + 1),
            hockey_stick(without, with_sample, loss, 12 * sigma + 1),
        )
        assert exact - 1e-9 <= delta <= exact * 1.001 + 1e-9


def capped_density(values, q, cap, sigma):
    """Density of one noised, capped Poisson sum over samples with these clipped values, by enumeration."""
    mixture = {}
    for drawn in itertools.product([0, 1], repeat=len(values)):
        chosen = [value for value, inside in zip(values, drawn, strict=True) if inside]
        chance = q ** len(chosen) * (1 - q) ** (len(values) - len(chosen))
        kept = list(itertools.combinations(chosen, cap)) if len(chosen) > cap else [tuple(chosen)]
        for subset in kept:
            mixture[sum(subset)] = mixture.get(sum(subset), 0.0) + chance / len(kept)
    return lambda x: sum(weight * stats.norm.pdf(x, mean, sigma) for mean, weight in mixture.items())


def worst_capped_deltas(losses, *, size, q, cap, sigma):
    """Largest divergences over neighbours of up to ``size`` + 1 samples with values ±1, both directions."""
    x = np.linspace(-size - 10 * sigma, size + 10 * sigma, 20_001)
    worst = np.zeros(len(losses))
    for others in range(cap - 1, size + 1):
        for positive in range(others + 1):
            values = [1.0] * positive + [-1.0] * (others - positive)
            without = capped_density(values, q, cap, sigma)(x)
            with_sample = capped_density([*values, 1.0], q, cap, sigma)(x)
            for first, second in ((with_sample, without), (without, with_sample)):
                excess = np.maximum(0.0, first - np.exp(losses)[:, None] * second)
                worst = np.maximum(worst, excess.sum(1) * (x[1] - x[0]))
    return worst


@pytest.mark.parametrize(("batch", "cap", "sigma"), [(2, 2, 0.7), (1, 1, 1.0)])
def test_the_cap_is_accounted_for(batch, cap, sigma):
    losses = np.array([0.5, 2.0, 5.0])
    exact = worst_capped_deltas(losses, size=4, q=batch / 4, cap=cap, sigma=sigma)
    assert (exact <= one_step_deltas(poisson(4, batch, sigma, cap), losses) + 1e-9).all()
    # Accounting that forgot the cap would be caught here.
    assert (exact > one_step_deltas(poisson(4, batch, sigma), losses) + 1e-6).any()


def test_the_cap_agrees_with_dp_accounting():
    for cap in (150, 110):
        mechanism = poisson(10_000, 100, 1.0, cap)
        theirs = (
            PLDAccountant(value_discretization_interval=2e-3).compose(mechanism.event(500)).get_epsilon(1e-5)
        )
        assert epsilon(mechanism, 500, 1e-5) == pytest.approx(theirs, rel=0.03)


def test_the_default_cap_costs_almost_nothing():
    cap = default_batch_cap(dataset_size=10_000, expected_batch_size=100)
    assert cap == 160
    capped, uncapped = (epsilon(poisson(10_000, 100, 0.8, c), 2000, 1e-5) for c in (cap, None))
    assert uncapped <= capped <= uncapped * 1.001
    assert default_batch_cap(dataset_size=20, expected_batch_size=16) == 21


def test_a_cap_above_the_dataset_size_never_acts():
    assert poisson(20, 16, 1.0, 21).cap_probability == 0.0
    # A neighbour has 21 samples, so that a cap of 20 may push one out.
    assert poisson(20, 16, 1.0, 20).cap_probability == pytest.approx(0.8**20)
    assert poisson(20, 20, 1.0, 20).cap_probability == 1.0
    assert replace(poisson(20, 20, 1.0, 20), neighbouring_relation="replace_one").cap_probability == 0.0
    assert poisson(20, 16, 1.0, 19).cap_probability > 0.05
    assert poisson(20, 20, 1.0).is_unsampled
    assert not poisson(20, 20, 1.0, 19).is_unsampled


# Composition.

RUNS = [
    (poisson(67_349, 1000, 0.6, 1190), 203, 7e-6),
    (poisson(1000, 100, 3.0, 160), 300, 1e-4),
    (poisson(67_349, 1000, 5.0, 1190), 200, 7e-6),
    (poisson(60_000, 256, 1.1, 352), 15_000, 1e-6),
]


def test_published_values():
    mechanism = poisson(10_000, 100, 0.8)
    assert epsilon(mechanism, 2000, 1e-5) == pytest.approx(4.293, abs=1e-3)
    assert epsilon(mechanism, 2000, 1e-5, accountant="rdp") == pytest.approx(4.861, abs=1e-3)


@pytest.mark.parametrize(("mechanism", "steps", "delta"), RUNS, ids=str)
def test_accountants_agree_and_a_coarse_grid_is_pessimistic(mechanism, steps, delta):
    fine = epsilon(mechanism, steps, delta)
    assert fine <= epsilon(mechanism, steps, delta, accountant="rdp") * (1 + 1e-6)
    # Its treatment of the cap is looser.
    assert fine * 0.999 <= epsilon(mechanism, steps, delta, accountant="prv") <= fine * 1.05 + 0.02
    curve = EpsilonCurve(mechanism, horizon=steps, cells=COARSE_CELLS)
    curve.composed(1)
    start = time.process_time()
    coarse = curve.epsilon(steps, delta)
    assert time.process_time() - start < 1.0  # about 0.1 s on a free core
    assert fine <= coarse * (1 + 1e-9)
    assert coarse <= fine * 1.01
    shorter = curve.epsilon(steps // 3, delta)
    assert epsilon(mechanism, steps // 3, delta) <= shorter < coarse


def test_epsilon_grows_with_steps_and_batch_and_falls_with_noise_and_delta():
    def quick(mechanism):
        return EpsilonCurve(mechanism, horizon=100, cells=4000).epsilon(100, 1e-5)

    curve = EpsilonCurve(poisson(1000, 50, 1.0, 93), horizon=100, cells=4000)
    by_steps = [curve.epsilon(steps, 1e-5) for steps in (0, 1, 2, 5, 20, 50, 99, 100)]
    assert by_steps[0] == 0.0
    assert by_steps == sorted(set(by_steps))
    by_delta = [curve.epsilon(100, delta) for delta in (1e-3, 1e-5, 1e-8, 1e-10)]
    by_noise = [quick(poisson(1000, 50, sigma, 93)) for sigma in (4.0, 2.0, 1.0, 0.5)]
    by_batch = [quick(poisson(1000, batch, 1.0)) for batch in (10, 50, 200)]
    by_cap = [quick(poisson(1000, 50, 1.0, cap)) for cap in (1000, 93, 75, 60, 50)]
    for values in (by_delta, by_noise, by_batch, by_cap):
        assert values == sorted(set(values))


@pytest.mark.skipif(not HAS_EXTENDED_PRECISION, reason="this processor has no extended precision")
def test_extended_precision_composes_the_same_distribution():
    grid = 0.05
    one_step = one_step_distributions(poisson(1000, 50, 0.9), grid)
    losses = np.linspace(0.0, 6.0, 50)
    for steps in (2, 3, 40):
        double, extended = (
            np.asarray(composed(one_step, steps, extended=choice).get_delta_for_epsilon(losses))
            for choice in (False, True)
        )
        assert double == pytest.approx(extended, rel=1e-9, abs=1e-14)
        assert extended[0] > extended[-1] > 0.0


@pytest.mark.parametrize(("mechanism", "steps"), [(poisson(1000, 50, 0.9), 1), (poisson(1000, 50, 0.9), 40),
                                                  (poisson(10**5, 256, 0.6), 20_000), (poisson(100, 50, 0.05), 30),
                                                  (poisson(100, 50, 3000.0), 2)], ids=str)  # fmt: skip
def test_epsilon_is_read_off_as_dp_accounting_does(mechanism, steps):
    grid = grid_width(mechanism, steps, COARSE_CELLS)
    for one_step in one_step_distributions(mechanism, grid):
        ours = ExtendedPmf.of(one_step).self_compose(steps)
        theirs = pld_pmf.DensePLDPmf(
            ours._discretization, ours._lower_loss, ours._probs, ours._infinity_mass, True
        )
        # What the tails were cut by counts as infinite loss.
        assert ours.get_epsilon_for_delta(5e-16) == math.inf
        for delta in (0.5, 1e-2, 1e-5, 1e-9, 1e-13, 1e-17):
            expected = theirs.get_epsilon_for_delta(delta)
            found = ours.get_epsilon_for_delta(delta)
            assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.skipif(not HAS_EXTENDED_PRECISION, reason="this processor has no extended precision")
@pytest.mark.parametrize("mechanism", [poisson(10**5, 256, 0.61161), poisson(10**4, 5000, 40.0)], ids=str)
def test_rounding_takes_less_than_what_is_allowed_for_it(mechanism):
    steps, losses = 20_000, np.linspace(0.5, 12.0, 60)
    one_step = one_step_distributions(mechanism, grid_width(mechanism, steps, FINE_CELLS))
    double, extended = (
        np.asarray(composed(one_step, steps, extended=choice).get_delta_for_epsilon(losses))
        for choice in (False, True)
    )
    lacking = (extended - double).max()
    # Not far more either: else nothing would be measured here.
    assert 1e-18 * steps < abs(extended - double).max()
    allowed = rounding_allowance(steps, extended=False)
    assert lacking < 0.5 * allowed
    assert rounding_allowance(steps) < 0.01 * allowed


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 30, 300, 3000, 30_000])
def test_losses_beyond_floating_point_have_a_bound(steps):
    mechanism = poisson(1000, 500, 0.05)
    found = [EpsilonCurve(mechanism, horizon=steps, cells=c).epsilon(steps, 1e-5) for c in (4000, FINE_CELLS)]
    # Beyond what floating point tells apart, ε is read off in whole cells.
    assert 0.0 < found[1] <= found[0] * 1.001 < math.inf
    assert found[0] <= gaussian_epsilon(math.sqrt(steps) / 0.05, 1e-5)
    shorter = EpsilonCurve(mechanism, horizon=steps, cells=4000).epsilon(max(1, steps // 2), 1e-5)
    assert shorter <= found[0]


def test_composition_by_steps_equals_the_product_distribution():
    mechanism = poisson(100, 20, 1.5, 47)
    once, twice = (EpsilonCurve(mechanism, horizon=2, cells=20_000).composed(steps) for steps in (1, 2))
    for loss in (0.1, 0.5, 1.0):
        by_hand = once.compose(once).get_delta_for_epsilon(loss)
        assert twice.get_delta_for_epsilon(loss) == pytest.approx(by_hand, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9, 1e-10])
@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (30.0, 1000), (100.0, 10_000)])
def test_numerical_composition_never_beats_the_exact_one(sigma, steps, delta):
    # With q so close to 1 that sampling does not matter, the closed form is the truth to 1e-9.
    almost_all = Mechanism(
        dataset_size=10,
        sampling="poisson",
        sampling_probability=1 - 1e-13,
        batch_cap=11,
        noise_multiplier=sigma,
    )
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    found = EpsilonCurve(almost_all, horizon=steps).epsilon(steps, delta)
    assert exact - 1e-9 <= found <= exact * 1.02


# Closed forms.


def test_closed_form_agrees_with_the_integral_and_inverts():
    for mu, eps in [(0.5, 0.1), (1.0, 1.0), (3.0, 4.0)]:
        exact = hockey_stick(lambda x, m=mu: stats.norm.pdf(x, m), stats.norm.pdf, eps, 15.0)
        assert gaussian_delta(mu, eps) == pytest.approx(exact, rel=1e-5)
        assert gaussian_epsilon(mu, gaussian_delta(mu, eps)) == pytest.approx(eps, rel=1e-6)
        assert gaussian_distance(eps, gaussian_delta(mu, eps)) == pytest.approx(mu, rel=1e-6)
    assert gaussian_delta(0.0, 1.0) == 0.0
    assert gaussian_epsilon(1e-9, 0.5) == 0.0
    assert math.isfinite(gaussian_epsilon(60.0, 1e-10))


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(20.0, 100, 1e-5), (4.0, 10, 1e-6)])
def test_full_batches_agree_with_dp_accounting(sigma, steps, delta):
    mechanism = full_batch(sigma)
    theirs = (
        PLDAccountant(value_discretization_interval=1e-3).compose(mechanism.event(steps)).get_epsilon(delta)
    )
    assert epsilon(mechanism, steps, delta) == pytest.approx(theirs, rel=2e-3)
    assert epsilon(mechanism, steps, delta) < epsilon(mechanism, steps, delta, accountant="rdp")


def test_full_batches_take_no_time_at_any_length():
    start = time.process_time()
    assert epsilon(full_batch(1000.0), 10**7, 1e-6) > 0
    assert time.process_time() - start < 0.2


def test_events_are_dp_accounting_s():
    assert full_batch(2.0).event(3) == dp_accounting.SelfComposedDpEvent(
        dp_accounting.GaussianDpEvent(2.0), 3
    )
    assert poisson(100, 10, 2.0).event(3).event == dp_accounting.PoissonSampledDpEvent(
        0.1, dp_accounting.GaussianDpEvent(2.0)
    )
    assert poisson(100, 10, 2.0, 20).event(3).event == dp_accounting.TruncatedSubsampledGaussianDpEvent(
        101, 0.1, 20, 2.0
    )


# Edges.


def test_no_noise_means_no_privacy():
    for accountant in ("pld", "rdp", "prv"):
        assert epsilon(poisson(100, 10, 0.0), 5, 1e-3, accountant=accountant) == math.inf
    assert epsilon(full_batch(0.0), 5, 1e-3) == math.inf


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_a_tight_cap_never_helps_the_other_accountants(accountant):
    values = [
        epsilon(poisson(10_000, 100, 1.0, cap), 100, 1e-5, accountant=accountant)
        for cap in (10_000, 150, 101)
    ]
    assert values == sorted(values)
    assert values[0] < values[1] < math.inf
    assert values[2] == math.inf  # honest: these accountants know no better bound


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, 1e-11, math.nan, math.inf])
def test_delta_is_checked(delta):
    with pytest.raises(ConfigurationError, match="delta"):
        epsilon(poisson(100, 10, 1.0), 5, delta)


def test_delta_is_checked_against_rounding(monkeypatch):
    # As on processors without extended precision.
    monkeypatch.setattr(loss_distribution, "HAS_EXTENDED_PRECISION", False)
    with pytest.raises(ConfigurationError, match="rounding after 1000000 steps"):
        EpsilonCurve(poisson(10**6, 10, 1.0), horizon=10**6).epsilon(10**6, 1e-10)
    assert most_steps(1e-10) < 10**4 < most_steps(1e-9)
    curve = EpsilonCurve(poisson(10**6, 10, 1.0), horizon=most_steps(1e-10))
    assert curve.epsilon(curve.horizon, 1e-10) > 0.0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dataset_size": 0}, "dataset_size"),
        ({"batch_cap": 1.5}, "batch_cap"),
        ({"sampling": "shuffle"}, "sampling"),
        ({"sampling_probability": 0.0}, "sampling_probability"),
        ({"sampling_probability": 1.5}, "sampling_probability"),
        ({"sampling": "full_batch"}, "full batches"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
    ],
)
def test_mechanisms_are_checked(change, match):
    settings = {
        "dataset_size": 10,
        "sampling": "poisson",
        "sampling_probability": 0.5,
        "batch_cap": 10,
        "noise_multiplier": 1.0,
    }
    with pytest.raises(ConfigurationError, match=match):
        Mechanism(**{**settings, **change})


def test_accountant_and_steps_are_checked():
    with pytest.raises(ConfigurationError, match="accountant"):
        epsilon(poisson(100, 10, 1.0), 5, 1e-3, accountant="gdp")
    for steps in (0, -1, 2.5, True):
        with pytest.raises(ConfigurationError, match="horizon"):
            epsilon(poisson(100, 10, 1.0), steps, 1e-3)
    with pytest.raises(ConfigurationError, match="horizon"):
        EpsilonCurve(poisson(100, 10, 1.0), horizon=5).epsilon(6, 1e-3)


def test_losses_are_written_rounded_up():
    assert rounded_up(1.2341) == "1.235"
    assert rounded_up(1.0) == "1.000"
    assert rounded_up(math.inf) == "∞"


# The other way round.


@pytest.mark.parametrize("mechanism", [poisson(1000, 50, 0.9, 93), full_batch(10.0)], ids=str)
def test_steps_within_a_budget_are_the_most(mechanism):
    curve = EpsilonCurve(mechanism, horizon=200, cells=4000)
    for target in (0.7, 3.0):
        steps = curve.steps_within(target_epsilon=target, target_delta=1e-5)
        assert curve.epsilon(steps, 1e-5) <= target
        assert steps == 200 or curve.epsilon(steps + 1, 1e-5) > target
    assert curve.steps_within(target_epsilon=1e-6, target_delta=1e-5) == 0
    assert curve.steps_within(target_epsilon=1e6, target_delta=1e-5) == 200


@pytest.mark.parametrize(
    ("size", "batch", "steps", "delta", "target"),
    [
        (10_000, 100, 2000, 1e-5, 0.1),
        (67_349, 1000, 203, 7e-6, 8.0),
        (1000, 100, 100, 1e-4, 100.0),
        (10**6, 100, 10**5, 1e-7, 2.0),
    ],
)
def test_calibrated_noise_meets_the_target_tightly_and_soon(size, batch, steps, delta, target):
    cap = default_batch_cap(dataset_size=size, expected_batch_size=batch)
    start = time.process_time()
    sigma = calibrate_noise(
        poisson(size, batch, 1.0, cap), target_epsilon=target, target_delta=delta, steps=steps
    )
    assert time.process_time() - start < 30  # 1 to 5 s on a free core
    assert epsilon(poisson(size, batch, sigma, cap), steps, delta) <= target
    assert epsilon(poisson(size, batch, sigma / 1.005, cap), steps, delta) > target


def test_calibration_trusts_the_verdict_not_the_search(monkeypatch):
    # A grid for the verdict that is coarser than that of the search shows a larger ε: more noise must follow.
    monkeypatch.setattr("dp_trainer.privacy.calibration.FINE_CELLS", 1000)
    sigma = calibrate_noise(poisson(10_000, 100, 1.0), target_epsilon=2.0, target_delta=1e-5, steps=500)
    mechanism = poisson(10_000, 100, sigma)
    judged = EpsilonCurve(mechanism, horizon=500, cells=1000).epsilon(500, 1e-5)
    assert EpsilonCurve(mechanism, horizon=500).epsilon(500, 1e-5) < judged <= 2.0


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0, 100.0])
def test_full_batch_calibration_is_exact(target):
    sigma = calibrate_noise(full_batch(1.0, 500), target_epsilon=target, target_delta=1e-6, steps=10_000)
    assert epsilon(full_batch(sigma, 500), 10_000, 1e-6) <= target
    assert epsilon(full_batch(sigma / (1 + 1e-6), 500), 10_000, 1e-6) > target


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_calibration_heeds_the_accountant(accountant):
    sigma = calibrate_noise(
        poisson(2000, 100, 1.0), target_epsilon=3.0, target_delta=1e-5, steps=100, accountant=accountant
    )
    assert epsilon(poisson(2000, 100, sigma), 100, 1e-5, accountant=accountant) <= 3.0
    assert epsilon(poisson(2000, 100, sigma / 1.01), 100, 1e-5, accountant=accountant) > 3.0


def test_targets_out_of_reach_are_errors():
    settings = {"mechanism": poisson(1000, 100, 1.0, 101), "target_delta": 1e-6, "steps": 1000}
    # RDP knows no bound for a cap that acts this often, whatever the noise.
    with pytest.raises(PrivacyBudgetError, match="batch_cap"):
        calibrate_noise(target_epsilon=1.0, accountant="rdp", **settings)
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigurationError, match="target_epsilon"):
            calibrate_noise(target_epsilon=target, **settings)


# What it means for attacks.


def test_attack_bounds_of_full_batches_are_exact():
    rates = attack_rates(full_batch(10.0), 100)
    assert rates == {rate: pytest.approx(gaussian_power(1.0, rate)) for rate in (0.001, 0.01, 0.1)}
    assert rates[0.01] == pytest.approx(stats.norm.sf(stats.norm.isf(0.01) - 1.0))


def test_attack_bounds_of_sampled_runs_are_reached_but_not_exceeded():
    q, sigma = 0.3, 0.7
    found = attack_rates(poisson(10, 3, sigma), 1)
    for rate, bound in found.items():
        # The likelihood-ratio test on one output is a threshold on it, in either direction.
        threshold = stats.norm.isf(rate, scale=sigma)
        power = (1 - q) * rate + q * stats.norm.sf(threshold, loc=1, scale=sigma)
        assert power - 1e-6 <= bound <= power * 1.3 + 1e-3
        assert rate < bound < 1


def test_attack_bounds_without_noise_say_that_all_is_lost():
    assert set(attack_rates(poisson(100, 10, 0.0), 5).values()) == {1.0}


def test_numbers_load_neither_torch_nor_transformers():
    code = (
        "import sys; import dp_trainer.privacy.calibration, dp_trainer.privacy.attack; "
        "assert not {'torch', 'transformers', 'opacus', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
