"""``privacy_unit: user`` from the settings to the weights: what one user can move, and the noise that covers it."""

from __future__ import annotations

import math

import pytest
import torch
from test_trainer import CASES, arguments, pad, toy_data, trainer

from dp_trainer import ConfigurationError, DPTrainer, PrivacyArguments, distributed
from dp_trainer.batches import LogicalBatchCollator
from dp_trainer.distributed import Ranks, RankSampler
from dp_trainer.privacy.accounting import epsilon
from dp_trainer.privacy.sampling import PoissonSampler, insecure_key
from dp_trainer.privacy.search import RandomTrials
from dp_trainer.privacy.users import UserSampler, rows_by_user
from dp_trainer.privacy.verification import verify_statement
from dp_trainer.release import release

ROWS = 3
USER = {"privacy_unit": "user", "user_column": "patient", "samples_per_user": ROWS}
SETTINGS = {"noise_multiplier": 1.0, "target_delta": 1e-3, **USER}


def data(users=(5, 1, 2, 7, 1, 4, 3, 1)) -> list[dict]:
    """Rows of users who have so many each, one user's not beside each other."""
    owners = sorted((place, user) for user, count in enumerate(users) for place in range(count))
    return [
        {**row, "patient": f"p{user}"} for (_, user), row in zip(owners, toy_data(len(owners)), strict=True)
    ]


def test_the_plan_counts_users(tmp_path):
    made = trainer(tmp_path, data=data(), privacy={**SETTINGS, "clipping": "flat", "clipping_norm": 0.5})
    plan = made.plan
    # Eight rows by the training arguments are two users of three rows, and 8 users four steps a pass.
    assert (plan.dataset_size, plan.expected_batch_size, plan.sampling_probability) == (8, 2, 0.25)
    assert plan.sensitivity == pytest.approx(1.5)
    assert plan.noise_std == pytest.approx(1.5)
    assert plan.divisor == 6
    assert plan.epsilon == epsilon(plan.mechanism, 3, 1e-3)
    assert "unit: one user" in str(plan)
    assert "N = 8, named by 'patient', at most 3 rows of each" in str(plan)


def test_whole_passes_are_passes_over_users(tmp_path):
    made = trainer(tmp_path, data=data(), privacy=SETTINGS, max_steps=-1, num_train_epochs=5)
    assert made.plan.steps == 20


@pytest.mark.filterwarnings("ignore:noise_multiplier 0")
@pytest.mark.parametrize("clipping", [{}, {"clipping": "flat", "clipping_norm": 1e-3}], ids=["auto", "flat"])
def test_a_user_moves_the_sum_by_no_more_than_the_sensitivity(tmp_path, clipping):
    rows = data()
    made = trainer(tmp_path, data=rows, privacy={**SETTINGS, **clipping, "noise_multiplier": 0.0})
    sampler = made.get_train_dataloader().batch_sampler
    collate = LogicalBatchCollator(data_collator=pad, samples_per_micro_batch=4)

    def summed(chosen):
        release(
            made.model, collate([{k: v for k, v in rows[i].items() if k != "patient"} for i in chosen]).micro_batches,
            per_sample_loss=made._per_sample_loss(), plan=made.plan, noise=made._noise, strategy="automatic",
            rounding_margin=0.0,
        )  # fmt: skip
        return torch.cat([p.grad.flatten() for p in made.model.parameters()]) * made.plan.divisor

    moved, most = [], 0
    for _ in range(20):
        drawn = sampler.draw()
        for user in {rows[i]["patient"] for i in drawn}:
            own = [i for i in drawn if rows[i]["patient"] == user]
            most = max(most, len(own))
            without = [i for i in drawn if rows[i]["patient"] != user]
            moved.append(float((summed(drawn) - summed(without)).norm()))
    assert most == ROWS
    assert max(moved) <= made.plan.sensitivity * (1 + 1e-4)
    # One row's bound would not do: the noise must cover more.
    assert max(moved) > 1.2 * made.plan.clipping.sensitivity


def test_the_noise_covers_a_user(tmp_path):
    made = trainer(tmp_path, data=data(), privacy={**SETTINGS, "expected_batch_size": 4})
    release(made.model, [], per_sample_loss=made._per_sample_loss(), plan=made.plan, noise=made._noise,
            strategy="automatic", rounding_margin=0.0)  # fmt: skip
    noise = torch.cat([p.grad.flatten() for p in made.model.parameters()])
    expected = ROWS * made.plan.clipping.sensitivity / (4 * ROWS)
    assert float(noise.std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * len(noise)))


def test_a_run_trains_and_its_statement_holds(tmp_path):
    made = trainer(tmp_path, data=data(), privacy={**SETTINGS, "neighbouring_relation": "replace_one"})
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    statement = made.privacy_statement()
    content = statement.to_dict()
    assert content["unit"].startswith("one user")
    assert content["neighbouring_relation"] == "replacing one user by another"
    assert content["epsilon_rdp"] is None
    assert verify_statement(content).epsilon == pytest.approx(statement.epsilon)
    assert "one given user or another was used" in statement.to_prose()
    assert content["plan"]["user_column"] == "patient"
    for changed in ({"user_column": None}, {"samples_per_unit": 1}, {"samples_per_unit": 4}, {"privacy_unit": "sample"},
                    {"neighbouring_relation": "add_or_remove_one"}):  # fmt: skip
        with pytest.raises(ConfigurationError, match=r"does not hold"):
            verify_statement({**content, "plan": {**content["plan"], **changed}})


def test_a_checkpoint_of_another_unit_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer(tmp_path, data=data(), privacy={**SETTINGS, "expected_batch_size": 2}, **settings).train()
    other = {**SETTINGS, "samples_per_user": 2, "expected_batch_size": 2}
    with pytest.raises(ConfigurationError, match="samples_per_unit was 3, is 2"):
        trainer(tmp_path, data=data(), privacy=other, **settings).train(resume_from_checkpoint=True)
    renamed = [{**row, "row_id": row["patient"]} for row in data()]
    other = {**SETTINGS, "user_column": "row_id", "expected_batch_size": 2}
    with pytest.raises(ConfigurationError, match="user_column was 'patient', is 'row_id'"):
        trainer(tmp_path, data=renamed, privacy=other, **settings).train(resume_from_checkpoint=True)
    samples = {"noise_multiplier": 1.0, "target_delta": 1e-3}
    with pytest.raises(ConfigurationError, match="privacy_unit was 'user', is 'sample'"):
        trainer(tmp_path, data=data(), privacy=samples, **settings).train(resume_from_checkpoint=True)


def test_ranks_share_each_draw_of_users():
    rows = rows_by_user(data(), "patient")

    def draws():
        users = PoissonSampler(
            dataset_size=8, sampling_probability=0.5, batch_cap=9, steps=9, key=insecure_key(1)
        )
        return UserSampler(users, rows=rows, samples_per_user=2, key=insecure_key(2))

    first, second = (
        RankSampler(draws(), Ranks(rank=rank, size=2, device=torch.device("cpu"))) for rank in (0, 1)
    )
    whole = draws()
    for _ in range(20):
        draw = whole.draw()
        shares = [ranked.share(ranked.sampler.draw()) for ranked in (first, second)]
        assert sorted(shares[0] + shares[1]) == draw
        assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_a_random_number_of_trials_is_refused_before_the_first_where_its_cost_is_not_known(tmp_path):
    settings = {"noise_multiplier": 1.0, "target_delta": 1e-3, "neighbouring_relation": "replace_one"}
    with pytest.raises(ConfigurationError, match=r"RandomTrials: .* fixed n_trials"):
        trainer(tmp_path, privacy=settings).hyperparameter_search(n_trials=RandomTrials(3.0))


def test_a_training_set_that_grew_is_refused(tmp_path):
    made = trainer(tmp_path, data=data(), privacy=SETTINGS)
    made.train_dataset = data((1,) * 9)
    with pytest.raises(ConfigurationError, match="9 users now, and the plan was made for 8"):
        made.train()


def test_users_and_their_rows_are_drawn_with_different_keys(tmp_path, monkeypatch):
    keys = []
    for name in ("PoissonSampler", "UserSampler"):
        kind = getattr(distributed, name)

        def spy(*values, kind=kind, **settings):
            keys.append(settings["key"].reveal())
            return kind(*values, **settings)

        monkeypatch.setattr(distributed, name, spy)
    trainer(tmp_path, data=data(), privacy=SETTINGS).get_train_dataloader()
    assert len(set(keys)) == 2


def test_a_stated_number_of_users_is_a_bound(tmp_path):
    assert trainer(tmp_path, data=data(), privacy={**SETTINGS, "dataset_size": 9}).plan.dataset_size == 9
    with pytest.raises(ConfigurationError, match="more users"):
        trainer(tmp_path, data=data(), privacy={**SETTINGS, "dataset_size": 7})


def test_a_dataset_without_the_column_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="'patient'"):
        DPTrainer(
            model=CASES["bert-classifier"].build(), args=arguments(tmp_path), train_dataset=toy_data(),
            data_collator=pad, privacy=PrivacyArguments(**SETTINGS),
        )  # fmt: skip


def test_samples_of_several_rows_are_refused(tmp_path):
    made = trainer(tmp_path)
    made.train()
    content = made.privacy_statement().to_dict()
    plan = content["plan"]
    # Twice the noise for rows that come in pairs: every other number agrees.
    altered = {
        "samples_per_unit": 2,
        "sensitivity": 2 * plan["sensitivity"],
        "noise_std": 2 * plan["noise_std"],
    }
    with pytest.raises(ConfigurationError, match="samples_per_unit: a sample is one row"):
        verify_statement({**content, "plan": {**plan, **altered}})
