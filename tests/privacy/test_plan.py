"""A plan's numbers belong together, and the accountant stops where they end."""

import copy
import json
import math
import pickle

import pytest

from dp_trainer.arguments import PrivacyArguments
from dp_trainer.errors import ConfigurationError, PrivacyBudgetError
from dp_trainer.privacy.accounting import Mechanism, epsilon
from dp_trainer.privacy.clipping import FlatClipping
from dp_trainer.privacy.plan import PrivacyAccountant, PrivacyWarning, make_plan


def plan(size=1000, batch=50, steps=20, **settings):
    if not {"target_epsilon", "noise_multiplier"} & set(settings):
        settings["noise_multiplier"] = 1.0
    arguments = PrivacyArguments(**{"target_delta": 1e-5, **settings})
    return make_plan(arguments, dataset_size=size, expected_batch_size=batch, steps=steps)


def full_batch(steps=20, **settings):
    """Closed form: plans at no cost."""
    return plan(steps=steps, **{"sampling": "full_batch", "noise_multiplier": 10.0, **settings})


@pytest.fixture(scope="module")
def sampled():
    return plan(clipping="flat", clipping_norm=0.3)


def test_numbers_of_a_given_noise(sampled):
    made = sampled
    assert (made.dataset_size, made.expected_batch_size, made.sampling_probability) == (1000, 50, 0.05)
    assert made.batch_cap == 93
    assert made.divisor == 50
    assert made.noise_std == pytest.approx(0.3)
    assert made.clipping == FlatClipping(0.3)
    assert made.steps == made.steps_asked == 20
    mechanism = Mechanism(
        dataset_size=1000, sampling="poisson", sampling_probability=0.05, batch_cap=93, noise_multiplier=1.0
    )
    assert made.mechanism == mechanism
    assert made.epsilon == epsilon(mechanism, 20, 1e-5)


def test_calibrated_noise():
    made = plan(target_epsilon=3.0)
    assert made.epsilon <= 3.0
    assert made.epsilon > 2.95
    assert made.steps == 20


def test_epsilon_after_is_an_upper_bound_that_ends_at_the_plan_s(sampled):
    made = sampled
    values = [made.epsilon_after(steps) for steps in (0, 1, 5, 19, 20)]
    assert values[0] == 0.0
    assert values[-1] == made.epsilon
    assert values == sorted(values)
    assert values[2] >= epsilon(made.mechanism, 5, 1e-5)
    with pytest.raises(ConfigurationError, match="horizon"):
        made.epsilon_after(21)


def test_replaced_samples_cost_more_for_the_same_noise():
    made = full_batch(neighbouring_relation="replace_one")
    assert made.noise_std == full_batch().noise_std
    assert made.epsilon == full_batch(noise_multiplier=5.0).epsilon
    assert made.epsilon_after(3) == full_batch(noise_multiplier=5.0).epsilon_after(3)
    assert "replace one" in str(made)
    assert made.describe()["neighbouring_relation"] == "replace_one"
    with pytest.raises(
        ConfigurationError, match="neighbouring_relation was 'add_or_remove_one', is 'replace_one'"
    ):
        PrivacyAccountant(made).load_state(PrivacyAccountant(full_batch()).state_dict())


def test_noise_is_calibrated_for_replaced_samples():
    made, plain = (plan(target_epsilon=3.0, neighbouring_relation=relation)
                   for relation in ("replace_one", "add_or_remove_one"))  # fmt: skip
    assert 2.95 < made.epsilon <= 3.0
    assert made.noise_multiplier > 1.01 * plain.noise_multiplier
    with pytest.raises(ConfigurationError, match="knows no bound"):
        plan(target_epsilon=3.0, neighbouring_relation="replace_one", accountant="rdp")


def test_full_batches():
    made = full_batch()
    assert (made.expected_batch_size, made.batch_cap, made.sampling_probability) == (1000, 1000, 1.0)
    assert made.grid is None
    assert "closed form" in str(made)
    with pytest.raises(ConfigurationError, match="full batches"):
        full_batch(expected_batch_size=50)


def test_settings_win_over_training_arguments():
    made = plan(expected_batch_size=100, dataset_size=2000, batch_cap=150, noise_multiplier=4.0)
    assert (made.expected_batch_size, made.dataset_size, made.batch_cap) == (100, 2000, 150)
    assert made.sampling_probability == 0.05
    assert made.dataset_size_stated
    assert "1000" not in json.dumps(made.describe())  # the true size stays private


def test_training_stops_when_the_budget_is_spent():
    made = full_batch(steps=500, target_epsilon=4.0)
    assert 1 <= made.steps < 500
    assert made.epsilon <= 4.0
    assert epsilon(made.mechanism, made.steps + 1, 1e-5) > 4.0
    assert f"after {made.steps} of 500 steps" in str(made)
    assert full_batch(steps=2, target_epsilon=4.0).steps == 2
    with pytest.raises(PrivacyBudgetError, match="Not one step"):
        full_batch(target_epsilon=0.01)


def test_training_stops_when_the_budget_is_spent_under_sampling():
    made = plan(steps=60, target_epsilon=2.0, noise_multiplier=0.9)
    assert 1 <= made.steps < 60
    assert made.epsilon <= 2.0 < epsilon(made.mechanism, made.steps + 1, 1e-5)


def test_str_and_describe_tell_all(sampled):
    made = sampled
    text = str(made)
    for part in ("N = 1000", "B = 50", "at most 93", "0.05", "flat", "0.3", "20", "1e-05"):
        assert part in text
    assert "INSECURE" not in text
    assert float(text.split("ε ≤ ")[1].split()[0]) >= made.epsilon
    described = json.loads(json.dumps(made.describe(), allow_nan=False))
    assert described["noise_std"] == 0.3
    assert described["clipping"] == {"name": "flat", "clipping_norm": 0.3}
    assert "INSECURE" in str(full_batch(insecure_noise_seed=1))


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"size": 0}, ConfigurationError, "at least one"),
        ({"batch": 1001}, ConfigurationError, "does not fit"),
        ({"batch": 0}, ConfigurationError, "does not fit"),
        ({"steps": 0}, ConfigurationError, "steps"),
        ({"steps": 2.5}, ConfigurationError, "steps"),
        ({"dataset_size": 999}, ConfigurationError, "more samples"),
        ({"expected_batch_size": 1001}, ConfigurationError, "does not fit"),
        ({"batch_cap": 49}, ConfigurationError, "batch_cap"),
        ({"target_delta": 1e-12}, ConfigurationError, "target_delta"),
    ],
    ids=str,
)
def test_contradictions_are_errors(settings, error, match):
    with pytest.raises(error, match=match):
        plan(**settings)


def test_dubious_settings_are_warned_about():
    with pytest.warns(PrivacyWarning, match="1/N"):
        full_batch(target_delta=1e-3)
    with pytest.warns(PrivacyWarning, match="no privacy"):
        made = full_batch(noise_multiplier=0.0)
    assert made.noise_std == 0.0
    assert made.epsilon_after(3) == math.inf
    assert "NO PRIVACY" in str(made)
    assert made.describe()["epsilon"] is None


# The accountant.


def test_no_step_beyond_the_plan():
    accountant = PrivacyAccountant(full_batch(steps=3))
    assert accountant.epsilon == 0.0
    seen = []
    for _ in range(3):
        accountant.spend_step()
        seen.append(accountant.epsilon)
    assert seen == sorted(set(seen))
    assert seen[-1] == accountant.plan.epsilon
    for _ in range(2):
        with pytest.raises(PrivacyBudgetError, match="All 3 steps"):
            accountant.spend_step()
    assert accountant.steps_spent == 3


def spent(count, **settings):
    accountant = PrivacyAccountant(full_batch(**settings))
    for _ in range(count):
        accountant.spend_step()
    return accountant


def test_a_resumed_run_counts_on():
    record = json.loads(json.dumps(spent(5).state_dict()))
    resumed = spent(0)
    resumed.load_state(record)
    assert resumed.steps_spent == 5
    assert resumed.epsilon == spent(5).epsilon
    resumed.spend_step()
    assert resumed.epsilon == spent(6).epsilon


def test_an_older_record_never_lowers_the_count():
    accountant = spent(5)
    with pytest.raises(ConfigurationError, match="counted 5 steps, the checkpoint 3"):
        accountant.load_state(spent(3).state_dict())
    assert accountant.steps_spent == 5
    accountant.load_state(spent(5).state_dict())


def test_a_record_survives_rounding_in_the_last_digits_only():
    record = spent(5).state_dict()
    spent(0, noise_multiplier=10.0 * (1 + 1e-14)).load_state(record)
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        spent(0, noise_multiplier=10.0 * (1 + 1e-6)).load_state(record)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"noise_multiplier": 11.0}, "noise_multiplier"),
        ({"target_delta": 2e-5}, "target_delta"),
        ({"clipping": "normalizing"}, "clipping"),
        ({"gamma": 0.02}, "clipping"),
        ({"clipping_norm": 2.0}, "clipping"),
        ({"dataset_size": 1001}, "dataset_size"),
    ],
    ids=str,
)
def test_a_record_of_another_plan_is_refused(change, name):
    other = spent(0, **change)
    with pytest.raises(ConfigurationError, match=f"{name} was"):
        other.load_state(spent(5).state_dict())
    assert other.steps_spent == 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sampling": "full_batch"}, "sampling was"),
        ({"batch_cap": 100}, "batch_cap was"),
        ({"expected_batch_size": 60}, "sampling_probability was"),
    ],
    ids=str,
)
def test_a_record_of_another_sampling_is_refused(sampled, change, name):
    then, now = PrivacyAccountant(sampled), PrivacyAccountant(plan(**change))
    with pytest.raises(ConfigurationError, match=name):
        now.load_state(then.state_dict())


def _without(key):
    return lambda record: {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: None,
        lambda record: {},
        lambda record: {**record, "steps_spent": 2},
        lambda record: {**record, "steps_spent": "5"},
        lambda record: {**record, "plan": {**record["plan"], "noise_multiplier": 12.0}},
        lambda record: {**record, "checksum": "0"},
        lambda record: {**record, "version": 2},
        lambda record: {**record, "extra": 1},
        _without("checksum"),
        _without("steps_spent"),
        _without("plan"),
        _without("version"),
    ],
)
def test_missing_or_damaged_records_are_refused(damage):
    resumed = spent(1)
    with pytest.raises(ConfigurationError, match="privacy record"):
        resumed.load_state(damage(spent(5).state_dict()))
    assert resumed.steps_spent == 1


def test_a_newer_record_is_refused(monkeypatch):
    monkeypatch.setattr("dp_trainer.privacy.accountant.RECORD_VERSION", 2)
    record = spent(5).state_dict()
    monkeypatch.undo()
    with pytest.raises(ConfigurationError, match="version 2"):
        spent(0).load_state(record)


def test_a_record_beyond_the_plan_is_refused():
    with pytest.raises(PrivacyBudgetError, match="has spent 5 steps, this plan allows 4"):
        spent(0, steps=4).load_state(spent(5).state_dict())


def test_records_hold_numbers_only():
    text = json.dumps(spent(5).state_dict())
    assert not {"seed", "key", "generator", "rng"} & set(text.replace('"', " ").split())


def test_plans_can_be_copied():
    made = full_batch()
    made.epsilon_after(3)
    assert pickle.loads(pickle.dumps(made)) == made
    assert copy.deepcopy(made) == made
