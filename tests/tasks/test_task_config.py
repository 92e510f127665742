from dataclasses import dataclass, field

import pytest

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.arguments import DataArguments, RunArguments
from dp_trainer.tasks.config import parse_configuration


@dataclass(frozen=True, kw_only=True)
class Settings:
    learning_rate: float = field(metadata={"help": "A number."})
    steps: int = 1
    names: list[str] | None = None
    extra: dict | str | None = None
    offset: float = 0.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("steps must be positive")


TYPES = (Settings, RunArguments)


def parse(tmp_path, text, *words):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_configuration(["--config", str(path), *words], TYPES)


def test_values_take_the_type_of_their_field(tmp_path):
    settings, run = parse(
        tmp_path,
        "learning_rate: 5e-3\nsteps: 7\nnames: [bias, 'a.*']\nprivate: false\nextra: {a: 1}\noffset: -1e-2\n",
    )
    # YAML 1.1 itself reads 5e-3, without a point, as a text.
    assert settings == Settings(
        learning_rate=0.005, steps=7, names=["bias", "a.*"], extra='{"a": 1}', offset=-0.01
    )
    assert run.private is False
    assert run.plots is True


@pytest.mark.parametrize(
    "words",
    [["--steps", "9"], ["--steps=9"], ["--steps", "8", "--steps", "9"], ["--learning-rate=1", "--steps=9"]],
)
def test_the_command_line_wins(tmp_path, words):
    assert parse(tmp_path, "learning_rate: 1\nsteps: 2\n", *words)[0].steps == 9


def test_lists_are_replaced_not_extended(tmp_path):
    settings, _ = parse(tmp_path, "learning_rate: 1\nnames: [a, b]\n", "--names", "c")
    assert settings.names == ["c"]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("learning_rat: 1", [], r"unknown key 'learning_rat'. Did you mean 'learning_rate'\?"),
        ("learning_rate: 1", ["--step=2"], r"unknown key '--step'. Did you mean '--steps'\?"),
        ("learning_rate: 1", ["--stpes", "2"], r"unknown key '--stpes'. Did you mean '--steps'\?"),
        ("learning_rate: 1", ["2"], "no key takes '2'"),
        ("learning_rate: 1", ["-steps", "2"], "no key takes '-steps'"),
        ("learning_rate: 1\nsteps: 2\nsteps: 3", [], r"line 3: 'steps' is set twice"),
        ("learning_rate: 1\nsteps:", [], "'steps' has no value"),
        ("learning_rate: 1\nnames: []", [], "'names' has no value"),
        ("learning_rate: 1\nnames: [--steps]", [], "must not start with '-'"),
        ("learning_rate: fast", [], "invalid float value: 'fast'"),
        ("learning_rate: 1\nsteps: 2.5", [], "invalid int value: '2.5'"),
        ("learning_rate: 1\nprivate: perhaps", [], "--private"),
        ("learning_rate: 1\nsteps: 0", [], "steps must be positive"),
        ("steps: 2", [], "required: --learning_rate"),
        ("learning_rate: [1", [], "not YAML"),
        ("- 1", [], "holds no settings"),
        ("", [], "holds no settings"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, text, words, message):
    with pytest.raises(ConfigurationError, match=message):
        parse(tmp_path, text, *words)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "other.yaml").write_text("steps: 1")
    with pytest.raises(ConfigurationError, match=r"no such file. There are .*other\.yaml"):
        parse_configuration(["--config", str(tmp_path / "absent.yaml")], TYPES)


@pytest.mark.parametrize("words", [[], ["--config"], ["--steps", "3"]])
def test_a_run_needs_a_file(words):
    with pytest.raises(ConfigurationError, match="--config"):
        parse_configuration(words, TYPES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "max_length=0"),
        ({"max_train_samples": -1}, "max_train_samples=-1"),
        ({"data_config": "sst2"}, "without data"),
    ],
)
def test_data_arguments_check_themselves(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        DataArguments(task="sst2", **settings)
