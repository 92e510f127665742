"""A search costs more than its best trial, and how much is a bound that holds."""

from dataclasses import replace

import dp_accounting
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant

from dp_trainer.arguments import PrivacyArguments
from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.accounting import _ORDERS, Mechanism
from dp_trainer.privacy.plan import make_plan
from dp_trainer.privacy.search import RandomTrials, best_of_random_epsilon, search_cost


def plan(**settings):
    arguments = PrivacyArguments(
        **{"target_delta": 1e-5, "noise_multiplier": 6.0, "sampling": "full_batch", **settings}
    )
    return make_plan(arguments, dataset_size=500, expected_batch_size=50, steps=10)


def mechanism(batch_cap=1000, noise=1.0):
    return Mechanism(
        dataset_size=1000,
        sampling="poisson",
        sampling_probability=0.05,
        batch_cap=batch_cap,
        noise_multiplier=noise,
    )


@pytest.mark.parametrize("mean", [2.0, 10.0, 100.0])
def test_the_best_of_random_trials_costs_what_dp_accounting_says(mean):
    run = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0)), 50
    )
    event = dp_event.RepeatAndSelectDpEvent(run, mean, 1)
    expected = RdpAccountant(orders=list(_ORDERS)).compose(event).get_epsilon(1e-5)
    found = best_of_random_epsilon(mechanism(), 50, 1e-5, mean_trials=mean)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found >= expected * (1 - 1e-9)


def test_replaced_samples_move_the_sum_twice_as_far():
    one = {"dataset_size": 100, "sampling": "full_batch", "sampling_probability": 1.0, "batch_cap": 100}
    replaced = Mechanism(**one, noise_multiplier=8.0, neighbouring_relation="replace_one")
    added = Mechanism(**one, noise_multiplier=4.0)
    found = best_of_random_epsilon(replaced, 10, 1e-5, mean_trials=5.0)
    assert found == pytest.approx(best_of_random_epsilon(added, 10, 1e-5, mean_trials=5.0))
    with pytest.raises(ConfigurationError, match="'rdp' knows no bound"):
        best_of_random_epsilon(
            replace(mechanism(), neighbouring_relation="replace_one"), 10, 1e-5, mean_trials=5.0
        )


def test_a_cap_only_adds():
    costs = [best_of_random_epsilon(mechanism(cap), 50, 1e-5, mean_trials=5.0) for cap in (1000, 110, 70, 60)]
    assert costs == sorted(costs)
    assert costs[1] < costs[0] * 1.02
    assert costs[3] > costs[0] * 1.1


def test_more_trials_cost_more_and_less_than_all_of_them():
    one = plan().epsilon
    all_ten = search_cost([(plan(), 10)] * 10)
    best = search_cost([(plan(), 10)] * 10, number=RandomTrials(10.0))
    assert one < best.epsilon < all_ten.epsilon
    assert all_ten.epsilon == pytest.approx(
        make_plan(
            PrivacyArguments(target_delta=1e-5, noise_multiplier=6.0, sampling="full_batch"),
            dataset_size=500, expected_batch_size=50, steps=100,
        ).epsilon
    )  # fmt: skip
    assert "10 trials" in str(best)
    assert "best trial alone" in str(best)


def test_trials_of_several_mechanisms_add_up():
    cost = search_cost([(plan(), 10), (plan(noise_multiplier=5.0), 10)])
    assert cost.epsilon == plan().epsilon + plan(noise_multiplier=5.0).epsilon
    assert cost.delta == 2e-5


@pytest.mark.parametrize(
    "other",
    [lambda: (plan(noise_multiplier=5.0), 10), lambda: (plan(), 9)],
    ids=["another mechanism", "stopped early"],
)
def test_trials_that_are_no_draws_of_one_distribution_are_refused(other):
    with pytest.raises(ConfigurationError, match="trial 1 has another mechanism or number of steps"):
        search_cost([(plan(), 10), other()], number=RandomTrials(3.0))


@pytest.mark.parametrize("mean", [1.0, 0, float("nan"), float("inf"), True, "10"])
def test_means_that_mean_nothing_are_refused(mean):
    with pytest.raises(ConfigurationError, match=r"RandomTrials\.mean"):
        RandomTrials(mean)


def test_numbers_of_trials_are_geometric_and_unforeseen():
    drawn = [RandomTrials(5.0).draw() for _ in range(4000)]
    assert min(drawn) == 1
    assert 4.5 < sum(drawn) / len(drawn) < 5.5  # seven standard errors
    assert 0.16 < drawn.count(1) / len(drawn) < 0.24
    assert drawn != [RandomTrials(5.0).draw() for _ in range(4000)]


def test_no_trial_is_no_search():
    with pytest.raises(ConfigurationError, match="no trial"):
        search_cost([])
