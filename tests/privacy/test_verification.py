"""A statement is held against itself: what was altered is refused by name, where the file alone allows it."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest

from dp_trainer.arguments import PrivacyArguments
from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy import verification
from dp_trainer.privacy.noise import NoiseGenerator
from dp_trainer.privacy.plan import make_plan
from dp_trainer.privacy.schema import schema_faults
from dp_trainer.privacy.statement import privacy_statement
from dp_trainer.privacy.verification import read_statement, statement_schema, verify_statement

SCRIPT = Path(__file__).parents[2] / "scripts" / "privacy.py"


def stated(*, steps=30, planned=40, **settings):
    arguments = PrivacyArguments(
        **{
            "target_delta": 1e-5,
            "noise_multiplier": 1.0,
            "clipping": "flat",
            "clipping_norm": 0.3,
            **settings,
        }
    )
    plan = make_plan(arguments, dataset_size=2000, expected_batch_size=100, steps=planned)
    noise = NoiseGenerator(
        device="cpu", insecure_seed=arguments.insecure_noise_seed, on_grid=arguments.secure_noise
    )
    statement = privacy_statement(
        plan,
        steps=min(steps, plan.steps),
        certificate={"samples": 4, "norm_error": 1e-7},
        generator=noise.describe(),
        other_computations=["evaluation on the validation set"],
    )
    return json.loads(statement.to_json())


@pytest.fixture(scope="module")
def sound():
    """Full batches: their closed form is quick."""
    return stated(sampling="full_batch", noise_multiplier=9.0)


@pytest.fixture(scope="module")
def sampled():
    return stated()


FULL = {"sampling": "full_batch", "noise_multiplier": 9.0}
SOUND = {
    "stopped early": {},
    "whole run, low cap": {"steps": 40, "batch_cap": 130},
    "rdp": {"accountant": "rdp"},
    "stopped by its budget": {**FULL, "target_epsilon": 2.0, "steps": 40},
    "not begun": {**FULL, "steps": 0},
    "full batches": FULL,
    "automatic clipping, budget": {
        **FULL, "clipping": "automatic", "clipping_norm": None, "noise_multiplier": None, "target_epsilon": 3.0,
    },
    "secure noise": {**FULL, "secure_noise": True},
    "fixed seed": {**FULL, "insecure_noise_seed": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_what_the_package_writes_holds(name):
    content = stated(**SOUND[name])
    found = verify_statement(content)
    assert found.epsilon <= content["epsilon"] * (1 + 1e-6)
    assert found.steps == content["steps"]
    assert list(found.warnings) == content["warnings"]
    assert schema_faults(content, statement_schema()) == []


@pytest.mark.filterwarnings("ignore:noise_multiplier 0")
def test_no_noise_claims_nothing_and_that_holds():
    content = stated(**{**FULL, "noise_multiplier": 0.0})
    assert content["epsilon"] is None
    assert verify_statement(content).epsilon == float("inf")
    content["warnings"] = []
    with pytest.raises(ConfigurationError, match="warnings: lacks 'NO PRIVACY"):
        verify_statement(content)


def put(place, value):
    def change(content):
        *outer, last = place.split("/")
        for name in outer:
            content = content[name]
        content[last] = value

    return change


def drop(place):
    def change(content):
        *outer, last = place.split("/")
        for name in outer:
            content = content[name]
        del content[last]

    return change


def scaled(place, factor):
    def change(content):
        *outer, last = place.split("/")
        for name in outer:
            content = content[name]
        content[last] = content[last] * factor

    return change


def both(*changes):
    def change(content):
        for one in changes:
            one(content)

    return change


TAMPERED_SAMPLED = {
    "ε lowered": (scaled("epsilon", 0.999), r"epsilon: is .* too small"),
    "q is not B/N": (put("plan/sampling_probability", 0.01), r"plan\.sampling_probability: is 0\.01"),
    "N raised": (put("plan/dataset_size", 20000), r"plan\.sampling_probability: is 0\.05"),
    "B lowered": (put("plan/expected_batch_size", 10), r"plan\.sampling_probability"),
    "q, B lowered": (
        both(put("plan/expected_batch_size", 10), put("plan/sampling_probability", 0.005)), r"altered",
    ),
    "cap below B": (put("plan/batch_cap", 90), r"plan\.batch_cap: is below"),
    "cap lowered": (put("plan/batch_cap", 105), r"epsilon: is .* too small"),
    "grid taken out": (put("grid", None), r"grid: is None"),
    "sampling renamed": (put("plan/sampling", "full_batch"), r"full batches have every sample"),
}  # fmt: skip

TAMPERED = {
    "ε lowered": (scaled("epsilon", 0.9), r"epsilon: is .* too small"),
    "ε lowered a little": (scaled("epsilon", 0.999), r"epsilon: is .* too small"),
    "ε of the plan lowered": (scaled("plan/epsilon", 0.9), r"plan\.epsilon: is .* too small"),
    "cross-check lowered": (scaled("epsilon_rdp", 0.9), r"epsilon_rdp: is .* too small"),
    "attack rate lowered": (scaled("true_positive_rate_bounds/0.01", 0.9), r"true_positive_rate_bounds\.0\.01: is"),
    "ε of a missing claim": (put("epsilon", None), r"warnings: lacks 'NO PRIVACY"),
    "σ raised": (put("plan/noise_multiplier", 9.9), r"plan\.noise_std: is 2\.69"),
    "σ raised with its std": (
        both(put("plan/noise_multiplier", 9.9), put("plan/noise_std", 9.9 * 0.3)),
        r"plan\.epsilon: .* noise were altered",
    ),
    "σ raised with its std, ε lowered too": (
        both(put("plan/noise_multiplier", 9.9), put("plan/noise_std", 9.9 * 0.3), scaled("epsilon", 0.2)),
        r"epsilon: is .* too small",
    ),
    "sensitivity lowered": (put("plan/sensitivity", 0.2), r"plan\.sensitivity: is 0\.2, but what clipping bounds"),
    "clipping norm lowered": (put("plan/clipping/clipping_norm", 0.2), r"plan\.sensitivity: is 0\.3"),
    "steps lowered": (put("steps", 10), r"epsilon: .* 10 releases .* steps or noise were altered"),
    "planned steps lowered": (put("plan/steps", 30), r"plan\.steps: fewer than plan\.steps_asked"),
    "planned and asked steps lowered": (
        both(put("plan/steps", 30), put("plan/steps_asked", 30)), r"plan\.epsilon: .* altered",
    ),
    "more steps than planned": (put("steps", 41), r"steps: more than plan\.steps"),
    "steps raised": (put("steps", 38), r"epsilon: is .* too small"),
    "δ lowered": (put("delta", 1e-6), r"plan\.target_delta: is 1e-05, but delta is 1e-06"),
    "both δ lowered": (both(put("delta", 1e-6), put("plan/target_delta", 1e-6)), r"epsilon: is .* too small"),
    "accountant": (put("accountant", "RDP"), r"accountant: is 'RDP'"),
    "target added": (put("plan/target_epsilon", 0.1), r"plan\.epsilon: above plan\.target_epsilon"),
    "shuffled": (put("plan/sampling", "shuffle"), r"plan\.sampling: is 'shuffle'"),
    "clipping renamed": (put("plan/clipping/name", "automatic"), r"plan\.clipping\.gamma: is missing"),
    "clipping with a stray setting": (put("plan/clipping/gamma", 0.1), r"plan\.clipping\.gamma: is no setting"),
    "limits taken out": (put("not_covered", ["nothing"]), r"not_covered: lacks 'training losses"),
    "grid attack left out": (
        lambda c: c["not_covered"].remove(next(x for x in c["not_covered"] if "floating-point" in x)),
        r"not_covered: lacks 'attacks on the floating-point",
    ),
    "certificate taken out": (put("certificate", None), r"warnings: lacks 'NO CERTIFICATE"),
    "seed hidden": (put("plan/noise_is_secure", False), r"warnings: lacks 'INSECURE"),
    "generator": (put("plan/noise_on_grid", True), r"plan\.noise_on_grid: noise_generator says otherwise"),
    "unit": (put("unit", "one user"), r"unit: is 'one user'"),
    "neighbours": (put("neighbouring_relation", "replacing one sample"), r"neighbouring_relation: is"),
    "unknown field": (put("epsilom", 1.0), r"epsilom: is no field"),
    "unknown field of the plan": (put("plan/sigma", 9.0), r"plan\.sigma: is no field"),
    "missing field": (drop("delta"), r"delta: is missing"),
    "missing field of the plan": (drop("plan/noise_std"), r"plan\.noise_std: is missing"),
    "missing attack rate": (drop("true_positive_rate_bounds/0.1"), r"true_positive_rate_bounds\.0\.1: is missing"),
    "wrong version": (put("statement_version", 1), r"statement_version: is 1"),
    "version true": (put("statement_version", True), r"statement_version: is True"),
    "no version": (drop("statement_version"), r"statement_version: is None"),
    "a text for a number": (put("epsilon", "0.1"), r"epsilon: is '0\.1', and must be of type"),
    "true for a number": (put("steps", True), r"steps: is True, and must be of type integer"),
    "negative": (put("epsilon", -1.0), r"epsilon: is -1\.0, and must be at least 0"),
    "rate above one": (put("true_positive_rate_bounds/0.1", 1.5), r"at most 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_altered_is_refused_by_name(sound, name):
    change, message = TAMPERED[name]
    content = copy.deepcopy(sound)
    change(content)
    with pytest.raises(ConfigurationError, match=message):
        verify_statement(content)


@pytest.mark.parametrize("name", TAMPERED_SAMPLED)
def test_what_was_altered_about_sampling_is_refused_by_name(sampled, name):
    change, message = TAMPERED_SAMPLED[name]
    content = copy.deepcopy(sampled)
    change(content)
    with pytest.raises(ConfigurationError, match=message):
        verify_statement(content)


def test_every_number_of_the_privacy_claim_is_worked_out_again(sound, monkeypatch):
    """A verifier that took the file's word for it would accept all of these."""
    monkeypatch.setattr(verification, "_wrong_bound", lambda *_: [])
    for name in ("ε lowered", "steps lowered", "both δ lowered"):
        content = copy.deepcopy(sound)
        TAMPERED[name][0](content)
        verify_statement(content)


def test_a_consistent_file_of_another_run_is_beyond_a_files_power():
    """What docs/privacy_statement.md says that no file can show."""
    first, second = (verify_statement(stated(**FULL, steps=steps)) for steps in (10, 30))
    assert first.epsilon < second.epsilon


# The file.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"epsilon": 9, "epsilon": 1}', "epsilon: stands twice"),
        ('{"plan": {"steps": 1, "steps": 2}}', "steps: stands twice"),
        ('{"epsilon": NaN}', "NaN: is no number"),
        ('{"epsilon": -Infinity}', "-Infinity: is no number"),
        ("[]", "no JSON object"),
        ("{", "cannot be read as JSON"),
        (None, "cannot be read as JSON"),
    ],
)
def test_files_that_are_no_statement(tmp_path, text, message):
    if text is not None:
        (tmp_path / "s.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        read_statement(tmp_path / "s.json")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("privacy_script_to_verify", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command(script, sound, tmp_path, capsys):
    path = tmp_path / "privacy_statement.json"
    path.write_text(json.dumps(sound), encoding="utf-8")
    assert script.main(["verify", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "holds" in printed
    assert "recomputed" in printed
    assert script.main(["verify", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["epsilon"]["recomputed"] <= found["epsilon"]["stated"] == sound["epsilon"]
    path.write_text(json.dumps({**sound, "epsilon": 0.9 * sound["epsilon"]}), encoding="utf-8")
    assert script.main(["verify", str(path)]) == 2
    assert "too small" in capsys.readouterr().err


# The schema.


def test_the_schema_and_the_statement_name_the_same_fields(sound):
    schema = statement_schema()
    for part, content in ((schema, sound), (schema["properties"]["plan"], sound["plan"])):
        assert set(part["properties"]) == set(part["required"]) == set(content)
        assert part["additionalProperties"] is False


KEYWORDS = {
    "type": ({"type": ["integer", "null"]}, [1, None], [1.5, True, "1", [], {}]),
    "number": ({"type": "number"}, [1, 1.5], [True, None, "1"]),
    "boolean": ({"type": "boolean"}, [True], [1, None]),
    "const": ({"const": 1}, [1], [2, True, 1.0, "1"]),
    "enum": ({"enum": ["a", "b"]}, ["a"], ["c", None]),
    "minimum": ({"minimum": 0}, [0, 1, "text"], [-1, float("nan"), float("inf")]),
    "maximum": ({"maximum": 1}, [1, 0.5], [1.1, float("nan")]),
    "exclusiveMinimum": ({"exclusiveMinimum": 0}, [0.1], [0, -1]),
    "exclusiveMaximum": ({"exclusiveMaximum": 1}, [0.9], [1]),
    "minItems": ({"minItems": 1}, [[1]], [[]]),
    "minLength": ({"minLength": 1}, ["a"], [""]),
    "items": ({"items": {"type": "string"}}, [["a"], []], [["a", 1]]),
    "required": ({"required": ["a"]}, [{"a": 1}, {"a": None}], [{}, {"b": 1}]),
    "properties": ({"properties": {"a": {"type": "string"}}}, [{"a": "x"}, {}], [{"a": 1}]),
    "additionalProperties": (
        {"properties": {"a": {}}, "additionalProperties": False},
        [{"a": 1}],
        [{"b": 1}],
    ),
    "additional of a type": ({"additionalProperties": {"type": "string"}}, [{"b": "x"}], [{"b": 1}]),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_accept_and_refuse(name):
    schema, fitting, wrong = KEYWORDS[name]
    assert [schema_faults(value, schema) for value in fitting] == [[]] * len(fitting)
    assert all(schema_faults(value, schema) for value in wrong)


def test_unknown_keywords_are_refused():
    with pytest.raises(ConfigurationError, match="pattern is no keyword"):
        schema_faults("a", {"pattern": "b"})
