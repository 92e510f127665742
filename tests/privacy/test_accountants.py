"""One contract for every accountant, sampling and neighbouring relation, and what only replacing and shuffling have."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from scipy import stats

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.accounting import ACCOUNTANTS, EpsilonCurve, epsilon
from dp_trainer.privacy.attack import attack_rates
from dp_trainer.privacy.gaussian import gaussian_epsilon, gaussian_power
from dp_trainer.privacy.loss_distribution import sampled_gaussian_deltas
from dp_trainer.privacy.mechanism import NEIGHBOURING_RELATIONS, SAMPLINGS, Mechanism, mechanism_of

SIZE, DELTA = 1000, 1e-5


def make(sampling="poisson", relation="add_or_remove_one", *, batch=50, sigma=1.5, size=SIZE, cap=None):
    return mechanism_of(
        dataset_size=size,
        sampling=sampling,
        expected_batch_size=size if sampling == "full_batch" else batch,
        noise_multiplier=sigma,
        batch_cap=cap,
        neighbouring_relation=relation,
    )


# Shuffled batches are only known for replaced samples.
RUNS = [
    pair
    for pair in itertools.product(SAMPLINGS, NEIGHBOURING_RELATIONS)
    if pair != ("shuffle", "add_or_remove_one")
]
ALL = [(accountant, *pair) for accountant in ACCOUNTANTS for pair in RUNS]
REFUSED = [("rdp", "poisson", "replace_one"), ("prv", "poisson", "replace_one")]
KNOWN = [case for case in ALL if case not in REFUSED]
contract = pytest.mark.parametrize(("accountant", "sampling", "relation"), KNOWN)


# The contract.


@contract
def test_epsilon_grows_with_steps(accountant, sampling, relation):
    curve = EpsilonCurve(make(sampling, relation), horizon=200, accountant=accountant)
    values = [curve.epsilon(steps, DELTA) for steps in (0, 1, 20, 60, 200)]
    assert values[0] == 0.0 < values[1]
    assert values == sorted(values)
    assert values[2] < values[3] < values[4]


@contract
def test_epsilon_falls_with_noise_and_delta(accountant, sampling, relation):
    by_noise = [epsilon(make(sampling, relation, sigma=sigma), 60, DELTA, accountant=accountant)
                for sigma in (8.0, 3.0, 1.0, 0.5)]  # fmt: skip
    by_delta = [epsilon(make(sampling, relation), 60, delta, accountant=accountant)
                for delta in (1e-2, 1e-4, 1e-6)]  # fmt: skip
    for values in (by_noise, by_delta):
        assert values == sorted(set(values))


@contract
def test_epsilon_grows_with_the_batch(accountant, sampling, relation):
    if sampling == "full_batch":
        with pytest.raises(ConfigurationError, match="full batches"):
            mechanism_of(dataset_size=10, sampling=sampling, expected_batch_size=5, noise_multiplier=1.0)
        return
    values = [epsilon(make(sampling, relation, batch=batch, cap=SIZE + 1 if sampling == "poisson" else None), 60, DELTA,
                      accountant=accountant) for batch in (10, 50, 250)]  # fmt: skip
    assert values == sorted(set(values))


@contract
def test_no_noise_is_infinite(accountant, sampling, relation):
    bare = make(sampling, relation, sigma=0.0)
    assert epsilon(bare, 3, DELTA, accountant=accountant) == math.inf
    assert set(attack_rates(bare, 3).values()) == {1.0}


@contract
def test_two_runs_compose(accountant, sampling, relation):
    # One run of 2T steps is two runs of T, the second of which may look at the first.
    mechanism = make(sampling, relation)
    half = epsilon(mechanism, 60, DELTA, accountant=accountant)
    assert epsilon(mechanism, 120, 2 * DELTA, accountant=accountant) <= 2 * half + 0.02


@pytest.mark.parametrize(("accountant", "sampling"), [case[:2] for case in KNOWN if case[2] == "replace_one"])
def test_replacing_costs_more_than_adding_or_removing(accountant, sampling):
    # A thousand shuffled in batches of 50 for 60 steps are three passes, each a release of the full batch to one sample.
    unsampled = sampling == "shuffle"
    plain = epsilon(
        make("full_batch" if unsampled else sampling), 3 if unsampled else 60, DELTA, accountant=accountant
    )
    assert epsilon(make(sampling, "replace_one"), 60, DELTA, accountant=accountant) > 1.01 * plain


@pytest.mark.parametrize(("sampling", "relation"), RUNS)
@pytest.mark.parametrize(("sigma", "steps", "batch"), [(0.7, 30, 20), (1.5, 300, 50), (5.0, 2000, 200)])
def test_loss_distributions_are_the_tightest(sampling, relation, sigma, steps, batch):
    mechanism = make(sampling, relation, sigma=sigma, batch=batch)
    tight = epsilon(mechanism, steps, DELTA)
    for accountant in ACCOUNTANTS[1:]:
        if (accountant, sampling, relation) in KNOWN:
            assert tight <= epsilon(mechanism, steps, DELTA, accountant=accountant) * (1 + 1e-6)


@pytest.mark.parametrize(("accountant", "sampling", "relation"), REFUSED)
def test_what_no_bound_is_known_for_is_refused(accountant, sampling, relation):
    with pytest.raises(ConfigurationError, match=f"'{accountant}' knows no bound .*replace_one"):
        epsilon(make(sampling, relation), 3, DELTA, accountant=accountant)


# Against the truth.


def outputs(q, sigma, relation):
    """(mean of P where the sample is in, density of P, density of Q), in every direction neighbours may differ."""

    def mixed(mean):
        return lambda x: (1 - q) * stats.norm.pdf(x, 0, sigma) + q * stats.norm.pdf(x, mean, sigma)

    if relation == "replace_one":
        return [(1.0, mixed(1.0), mixed(-1.0))]
    return [(1.0, mixed(1.0), mixed(0.0)), (0.0, mixed(0.0), mixed(1.0))]


@pytest.mark.parametrize("delta", [1e-2, 1e-4])
@pytest.mark.parametrize(("batch", "sigma"), [(50, 0.7), (300, 1.5), (1000, 3.0)])
@contract
def test_one_step_is_an_upper_bound_of_the_integral(accountant, sampling, relation, batch, sigma, delta):
    q = batch / SIZE if sampling == "poisson" else 1.0
    found = epsilon(make(sampling, relation, batch=batch, sigma=sigma, cap=SIZE + 1 if sampling == "poisson" else None), 1,
                    delta, accountant=accountant)  # fmt: skip
    x = np.linspace(-40, 40, 400_001)

    def exact(eps):
        pairs = [(p(x), other(x)) for _, p, other in outputs(q, sigma, relation)]
        return max(np.maximum(0.0, p - math.exp(eps) * other).sum() for p, other in pairs) * (x[1] - x[0])

    assert exact(found) <= delta * (1 + 1e-6)
    if accountant == "pld":
        assert found == 0.0 or exact(found * 0.995 - 1e-4) > delta


@pytest.mark.parametrize("relation", NEIGHBOURING_RELATIONS)
def test_many_steps_are_an_upper_bound_of_a_simulation(relation):
    q, sigma, steps, delta, runs = 0.05, 0.9, 30, 0.02, 50_000
    rng = np.random.default_rng(0)
    found = epsilon(make("poisson", relation, sigma=sigma, cap=SIZE + 1), steps, delta)
    simulated = []
    for mean, p, other in outputs(q, sigma, relation):
        losses = np.zeros(runs)
        for _ in range(steps):
            x = rng.normal(0, sigma, runs) + mean * (rng.random(runs) < q)
            losses += np.log(p(x) / other(x))
        simulated.append(losses)

    def delta_of(eps):
        gains = [np.maximum(0.0, -np.expm1(eps - losses)) for losses in simulated]
        return max((gain.mean(), gain.std() / math.sqrt(runs)) for gain in gains)

    mean, error = delta_of(found)
    assert mean <= delta + 4 * error
    # As tight as chance can tell: a few per cent less would be too little.
    mean, error = delta_of(found * 0.9)
    assert mean > delta + 4 * error


@pytest.mark.parametrize("relation", NEIGHBOURING_RELATIONS)
@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (30.0, 1000), (3000.0, 10**6)])
def test_nothing_is_below_the_closed_form_without_sampling(relation, sigma, steps):
    shift = 2.0 if relation == "replace_one" else 1.0
    exact = gaussian_epsilon(shift * math.sqrt(steps) / sigma, DELTA)
    unsampled = make("full_batch", relation, sigma=sigma)
    assert epsilon(unsampled, steps, DELTA) == exact
    assert epsilon(unsampled, steps, DELTA, accountant="rdp") > exact
    # Sampling that leaves nearly nobody out goes through the numerical composition.
    nearly = replace(make("poisson", relation, sigma=sigma, cap=SIZE + 1), sampling_probability=1 - 1e-13)
    assert not nearly.is_unsampled
    assert exact - 1e-9 <= epsilon(nearly, steps, DELTA) <= exact * 1.01


# The grid's δ, beside dp_accounting's own loop.


@pytest.mark.parametrize("adjacency", list(AdjacencyType))
@pytest.mark.parametrize(
    ("sigma", "q"), [(0.05, 0.3), (0.1, 1e-7), (1.0, 0.01), (0.6, 0.1), (30.0, 0.5), (0.5, 1.0), (0.1, 0.999)]
)
def test_deltas_agree_with_dp_accounting_s(sigma, q, adjacency):
    theirs = GaussianPrivacyLoss(
        sigma, sampling_prob=q, adjacency_type=adjacency, log_mass_truncation_bound=-50
    )
    bounds = theirs.connect_dots_bounds()
    losses = np.linspace(bounds.epsilon_lower, bounds.epsilon_upper, 301)
    expected = np.asarray(theirs.get_delta_for_epsilon(losses))
    assert np.abs(sampled_gaussian_deltas(losses, sigma, q, adjacency) - expected).max() < 3e-15


# Replacing.


@pytest.mark.parametrize("cap", [SIZE + 1, 60])
def test_replacing_agrees_with_dp_accounting(cap):
    mechanism = make("poisson", "replace_one", cap=cap)
    theirs = PLDAccountant(NeighboringRelation.REPLACE_ONE, value_discretization_interval=1e-3)
    expected = theirs.compose(mechanism.event(50)).get_epsilon(DELTA)
    # Where the cap acts they take a smaller probability of getting in.
    assert epsilon(mechanism, 50, DELTA) == pytest.approx(expected, rel=2e-3 if cap > SIZE else 0.08)


def test_the_cap_is_accounted_for_when_samples_are_replaced():
    size, q, cap, sigma = 4, 0.5, 2, 0.8
    losses = np.array([0.5, 2.0, 4.0])
    x = np.linspace(-15, 15, 20_001)

    def density(values):
        total = np.zeros_like(x)
        for drawn in itertools.product([0, 1], repeat=size):
            chosen = [value for value, inside in zip(values, drawn, strict=True) if inside]
            kept = list(itertools.combinations(chosen, cap)) if len(chosen) > cap else [tuple(chosen)]
            for subset in kept:
                total += (
                    stats.norm.pdf(x, sum(subset), sigma)
                    * q ** len(chosen)
                    * (1 - q) ** (size - len(chosen))
                    / len(kept)
                )
        return total

    worst = np.zeros(len(losses))
    for positive in range(size):
        others = [1.0] * positive + [-1.0] * (size - 1 - positive)
        p, other = density([*others, 1.0]), density([*others, -1.0])
        for first, second in ((p, other), (other, p)):
            excess = np.maximum(0.0, first - np.exp(losses)[:, None] * second).sum(1) * (x[1] - x[0])
            worst = np.maximum(worst, excess)

    def bound(cap):
        mechanism = Mechanism(
            dataset_size=size, sampling="poisson", sampling_probability=q, batch_cap=cap, noise_multiplier=sigma,
            neighbouring_relation="replace_one",
        )  # fmt: skip
        composed = EpsilonCurve(mechanism, horizon=1, cells=20_000).composed(1)
        return np.asarray(composed.get_delta_for_epsilon(losses))

    assert (worst <= bound(cap) + 1e-9).all()
    assert (bound(cap) > bound(size)).all()


# Shuffling.


def test_shuffled_batches_count_the_releases_that_hold_one_sample():
    rng = np.random.default_rng(0)
    for size, batch, steps in [(10, 3, 11), (10, 3, 12), (12, 4, 6), (5, 5, 4), (7, 1, 20), (9, 3, 1)]:
        mechanism = make("shuffle", "replace_one", batch=batch, size=size)
        held = np.zeros(size, dtype=int)
        done = 0
        while done < steps:
            order = rng.permutation(size)
            for start in range(0, size, batch):
                if done < steps:
                    held[order[start : start + batch]] += 1
                    done += 1
        assert held.max() == mechanism.releases_with_one_sample(steps)


def test_shuffling_claims_no_amplification():
    shuffled, sampled = (make(kind, "replace_one", sigma=0.8) for kind in ("shuffle", "poisson"))
    # 100 steps of 50 out of 1000 are five passes.
    assert epsilon(shuffled, 100, DELTA) == gaussian_epsilon(2 * math.sqrt(5) / 0.8, DELTA)
    assert epsilon(shuffled, 101, DELTA) == gaussian_epsilon(2 * math.sqrt(6) / 0.8, DELTA)
    assert epsilon(shuffled, 100, DELTA) > 2.5 * epsilon(sampled, 100, DELTA)
    assert attack_rates(shuffled, 100)[0.01] == pytest.approx(gaussian_power(2 * math.sqrt(5) / 0.8, 0.01))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"neighbouring_relation": "swap"}, "neighbouring_relation"),
        ({"sampling": "shuffle"}, "shuffled batches"),
        ({"sampling": "shuffle", "sampling_probability": 1.0}, "moves others between batches"),
    ],
)
def test_mechanisms_are_checked(change, match):
    with pytest.raises(ConfigurationError, match=match):
        replace(make(), **change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"expected_batch_size": 0}, "does not fit"),
        ({"expected_batch_size": 101}, "does not fit"),
        ({"expected_batch_size": 1.5}, "does not fit"),
        ({"batch_cap": 9}, "batch_cap"),
        ({"sampling": "shuffle", "batch_cap": 20}, "no meaning"),
    ],
)
def test_batches_are_checked(change, match):
    settings = {
        "dataset_size": 100,
        "sampling": "poisson",
        "expected_batch_size": 10,
        "noise_multiplier": 1.0,
    }
    with pytest.raises(ConfigurationError, match=match):
        mechanism_of(**{**settings, **change})
