"""Settings are checked where they are written, and parse from the command line and from YAML."""

import dataclasses
import math

import pytest
import yaml
from transformers import HfArgumentParser

from dp_trainer.arguments import STRATEGIES, PrivacyArguments
from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.clipping import (
    CLIPPING_FUNCTIONS,
    AutomaticClipping,
    FlatClipping,
    GlobalClipping,
    NormalizingClipping,
)

FIELDS = {field.name: field for field in dataclasses.fields(PrivacyArguments)}


def make(**settings):
    return PrivacyArguments(**{"target_epsilon": 8.0, "target_delta": 1e-5, **settings})


def test_every_field_is_explained_and_only_delta_is_required():
    assert all(field.metadata["help"] for field in FIELDS.values())
    required = [name for name, field in FIELDS.items() if field.default is dataclasses.MISSING]
    assert required == ["target_delta"]
    assert all(field.kw_only for field in FIELDS.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().target_epsilon = 1.0


def test_defaults():
    arguments = make()
    assert arguments.clipping_function() == AutomaticClipping(gamma=0.01, clipping_norm=1.0)
    assert (arguments.sampling, arguments.accountant, arguments.strategy) == ("poisson", "pld", "automatic")
    assert arguments.certificate_samples == 8
    assert arguments.insecure_noise_seed is None


def test_command_line():
    words = ["--target_delta", "1e-5", "--target_epsilon=8", "--clipping", "flat", "--clipping_norm", "0.5"]
    words += ["--batch_cap", "70"]
    (arguments,) = HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses(words)
    assert arguments == make(clipping="flat", clipping_norm=0.5, batch_cap=70)


@pytest.mark.parametrize(
    "word", ["--clipping=none", "--sampling=shuffle", "--accountant=gdp", "--clipping_norn=1"]
)
def test_unknown_words_are_refused(word, capsys):
    with pytest.raises((SystemExit, ValueError)):
        HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses(
            ["--target_delta=1e-5", "--target_epsilon=8", word]
        )


def test_missing_delta_is_refused(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses(["--target_epsilon=8"])
    assert "target_delta" in capsys.readouterr().err
    with pytest.raises(TypeError, match="target_delta"):
        PrivacyArguments(target_epsilon=8.0)


def test_yaml(tmp_path):
    path = tmp_path / "privacy.yaml"
    path.write_text(yaml.safe_dump({"target_epsilon": 8, "target_delta": 1.0e-5, "sampling": "full_batch"}))
    (arguments,) = HfArgumentParser(PrivacyArguments).parse_yaml_file(str(path))
    assert arguments == make(sampling="full_batch")
    path.write_text("target_epsilon: 8\ntarget_delta: 1e-5\n")  # a text in YAML 1.1
    with pytest.raises(ConfigurationError, match=r"target_delta is '1e-5'.*1\.0e-5"):
        HfArgumentParser(PrivacyArguments).parse_yaml_file(str(path))


def test_misspelt_names_are_refused():
    with pytest.raises(TypeError, match="clipping_norn"):
        make(clipping_norn=1.0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gamma": 0.5, "clipping_norm": 2}, AutomaticClipping(gamma=0.5, clipping_norm=2)),
        ({"clipping": "normalizing"}, NormalizingClipping()),
        ({"clipping": "flat", "clipping_norm": 0.1}, FlatClipping(0.1)),
        ({"clipping": "global", "clipping_norm": 1.0, "cutoff": 4.0}, GlobalClipping(1.0, 4.0)),
    ],
)
def test_clipping_functions(settings, expected):
    assert make(**settings).clipping_function() == expected


def test_every_clipping_function_can_be_chosen():
    needed = {"clipping_norm": 1.0, "cutoff": 2.0}
    for name, kind in CLIPPING_FUNCTIONS.items():
        settings = {
            key: value for key, value in needed.items() if key in {f.name for f in dataclasses.fields(kind)}
        }
        assert type(make(clipping=name, **settings).clipping_function()) is kind
    assert all(make(strategy=name).strategy == name for name in STRATEGIES)


BAD_NUMBERS = [math.nan, math.inf, "8", True]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_epsilon": None}, "neither target_epsilon nor noise_multiplier"),
        ({"target_epsilon": 0.0}, "target_epsilon"),
        ({"target_epsilon": -1.0}, "target_epsilon"),
        *(({"target_epsilon": value}, "target_epsilon") for value in BAD_NUMBERS),
        *(({"target_delta": value}, "target_delta") for value in (0.0, 1.0, -1e-5, 2.0, None, *BAD_NUMBERS)),
        ({"noise_multiplier": -0.1}, "noise_multiplier"),
        *(({"noise_multiplier": value}, "noise_multiplier") for value in BAD_NUMBERS),
        ({"clipping": "none"}, "clipping"),
        ({"clipping": "flat"}, "clipping_norm"),
        ({"clipping": "flat", "clipping_norm": 0.0}, "clipping_norm"),
        ({"clipping": "flat", "clipping_norm": 1.0, "gamma": 0.01}, "gamma"),
        ({"clipping": "global", "clipping_norm": 1.0}, "cutoff"),
        ({"cutoff": 1.0}, "cutoff"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": "0.01"}, "gamma"),
        ({"clipping": "normalizing", "gamma": 0.01}, "gamma"),
        ({"sampling": "shuffle"}, "sampling"),
        ({"sampling": "full_batch", "batch_cap": 5}, "batch_cap"),
        ({"accountant": "gdp"}, "accountant"),
        ({"neighbouring_relation": "swap"}, "neighbouring_relation"),
        ({"privacy_unit": "user"}, "user_column"),
        ({"privacy_unit": "user", "user_column": "patient"}, "samples_per_user"),
        ({"privacy_unit": "user", "user_column": 3, "samples_per_user": 2}, "user_column"),
        ({"privacy_unit": "user", "user_column": "patient", "samples_per_user": 0}, "samples_per_user"),
        ({"privacy_unit": "user", "user_column": "patient", "samples_per_user": 1.5}, "samples_per_user"),
        ({"samples_per_user": 2}, "no meaning"),
        ({"user_column": "patient"}, "no meaning"),
        ({"privacy_unit": "household"}, "privacy_unit"),
        ({"strategy": "ghost"}, "strategy"),
        ({"certificate_samples": -1}, "certificate_samples"),
        ({"certificate_samples": 1}, "certificate_samples"),
        ({"certificate_samples": 1}, "at least 2"),
        ({"certificate_samples": None}, "certificate_samples"),
        ({"insecure_noise_seed": 0.5}, "insecure_noise_seed"),
        *(
            ({name: value}, name)
            for name in ("expected_batch_size", "dataset_size", "batch_cap", "micro_batch_tokens")
            for value in (0, -1, 1.5, True, "4")
        ),
    ],
    ids=str,
)
def test_values_are_checked(settings, match):
    with pytest.raises(ConfigurationError, match=match):
        make(**settings)


def test_both_targets_and_noise_are_allowed():
    assert make(noise_multiplier=0.0).noise_multiplier == 0.0
    assert make(target_epsilon=None, noise_multiplier=1).noise_multiplier == 1
