"""The statement says everything that PRIVACY.md asks for, and what is wrong loudly."""

import json

import pytest

from dp_trainer.arguments import PrivacyArguments
from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.noise import NoiseGenerator
from dp_trainer.privacy.plan import PrivacyWarning, make_plan
from dp_trainer.privacy.statement import privacy_statement

CERTIFICATE = {"samples": 4, "norm_error": 1.25e-7, "sum_error": 3.5e-7}


def make(*, certificate=CERTIFICATE, steps=7, generator=None, **settings):
    arguments = PrivacyArguments(
        **{"target_delta": 1e-5, "noise_multiplier": 6.0, "sampling": "full_batch", **settings}
    )
    plan = make_plan(arguments, dataset_size=500, expected_batch_size=50, steps=10)
    noise = NoiseGenerator(device="cpu", insecure_seed=arguments.insecure_noise_seed)
    return privacy_statement(
        plan,
        steps=steps,
        certificate=certificate,
        generator=generator or noise.describe(),
        versions={"torch": "9.9"},
        other_computations=["evaluation on the validation set"],
    )


@pytest.fixture(scope="module")
def sampled():
    return make(sampling="poisson", clipping="flat", clipping_norm=0.3)


def test_json_holds_every_item(sampled):
    content = json.loads(sampled.to_json())
    plan = content["plan"]
    assert content["unit"].startswith("one sample")
    assert content["neighbouring_relation"] == "adding or removing one sample"
    assert (plan["dataset_size"], plan["dataset_size_stated"]) == (500, False)
    assert (plan["sampling"], plan["batch_cap"], plan["sampling_probability"]) == ("poisson", 93, 0.1)
    assert (plan["noise_multiplier"], plan["sensitivity"]) == (6.0, 0.3)
    assert plan["clipping"] == {"name": "flat", "clipping_norm": 0.3}
    assert (content["steps"], content["delta"]) == (7, 1e-5)
    assert content["epsilon"] == sampled.plan.epsilon_after(7)
    assert content["accountant"] == "PLD"
    assert content["grid"] > 0
    assert content["epsilon_rdp"] > content["epsilon"]
    assert set(content["true_positive_rate_bounds"]) == {"0.001", "0.01", "0.1"}
    assert content["certificate"] == CERTIFICATE
    assert "operating system" in content["noise_generator"]
    assert content["versions"] == {"torch": "9.9"}
    assert "evaluation on the validation set" in content["not_covered"]
    assert content["warnings"] == []


def test_replaced_samples_are_said():
    statement = make(sampling="poisson", neighbouring_relation="replace_one")
    content = json.loads(statement.to_json())
    assert content["neighbouring_relation"] == "replacing one sample by another"
    assert content["epsilon_rdp"] is None
    assert content["epsilon"] > make(sampling="poisson").epsilon
    prose = statement.to_prose()
    assert "replacing one sample by another" in prose
    assert "no bound known" in prose
    assert "adding or removing" not in prose
    assert json.loads(make(neighbouring_relation="replace_one").to_json())["epsilon_rdp"] > 0


def test_prose_is_one_page_and_never_rounds_down(sampled):
    prose = sampled.to_prose()
    for part in (
        "one sample",
        "adding or removing",
        "N = 500",
        "taken as public",
        "probability 0.1",
        "at most 93",
        "flat (clipping_norm 0.3)",
        "7 of 10",
        "1e-05",
        "PLD, grid",
        "Rényi",
        "AES-256",
        "norm_error 1.25e-07",
        "does not cover",
        "evaluation on the validation set",
        "torch 9.9",
    ):
        assert part in prose
    assert len(prose.splitlines()) < 60
    shown = float(prose.split("weights are (")[1].split(",")[0])
    assert sampled.epsilon <= shown <= sampled.epsilon + 1.01e-3
    for rate, bound in sampled.attack.items():
        line = next(line for line in prose.splitlines() if line.startswith(f"| {rate:.1%} |"))
        assert float(line.split("|")[2].strip().rstrip("%")) / 100 >= bound - 1e-9


def test_model_card_leaves_measurements_out(sampled):
    card = sampled.model_card_section()
    assert card.startswith("## Privacy")
    assert "norm_error" not in card
    assert "differentially private" in card


def test_full_batches_say_closed_form():
    statement = make()
    assert json.loads(statement.to_json())["accountant"] == "closed form"
    assert "closed form" in statement.to_prose()
    assert "every sample, every step" in statement.to_prose()


def test_stated_sizes_are_called_so():
    assert "N = 600 (stated beforehand)" in make(dataset_size=600).to_prose()


@pytest.mark.parametrize(
    ("settings", "loud"),
    [
        ({"insecure_noise_seed": 3}, "INSECURE NOISE"),
        ({"insecure_noise_seed": 3, "generator": "something else"}, "INSECURE NOISE"),
        ({"generator": "INSECURE: fixed seed"}, "INSECURE NOISE"),
        ({"certificate": None}, "NO CERTIFICATE"),
    ],
    ids=["seed", "seed hidden by the caller", "generator", "certificate"],
)
def test_what_is_wrong_is_said_loudly_everywhere(settings, loud):
    statement = make(**settings)
    for text in (statement.to_json(), statement.to_prose(), statement.model_card_section()):
        assert loud in text
    assert loud not in make().to_json()
    # Before the claim, not after it.
    assert statement.to_prose().index(loud) < statement.to_prose().index("weights are")


def test_no_noise_makes_no_claim():
    with pytest.warns(PrivacyWarning):
        statement = make(noise_multiplier=0.0)
    assert json.loads(statement.to_json())["epsilon"] is None
    assert "NO PRIVACY" in statement.to_prose()
    assert "no differential-privacy guarantee" in statement.to_prose()
    assert "-differentially private." not in statement.to_prose()


def test_large_delta_is_said():
    with pytest.warns(PrivacyWarning):
        statement = make(target_delta=0.01)
    assert "LARGE δ" in statement.to_prose()


def test_nothing_spent_and_too_much_spent():
    for settings in ({}, {"sampling": "poisson"}):
        untrained = make(steps=0, **settings)
        assert untrained.attack == {rate: rate for rate in (0.001, 0.01, 0.1)}
        assert json.loads(untrained.to_json())["epsilon"] == 0.0
    with pytest.raises(ConfigurationError, match="horizon"):
        make(steps=11)
