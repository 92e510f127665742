"""Reads a run's settings: one YAML file, overridden by the command line.

Guarantee: every key is understood or refused. A misspelt key, a repeated key, a
value of the wrong type and an abbreviation are errors that name the nearest
valid name, whether they come from YAML or from the command line; nothing is
dropped silently, so the run's settings are those that its files say.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.names import nearest, quoted


def parse_configuration(argv: Sequence[str], types: Sequence[type]) -> tuple[Any, ...]:
    """Builds one instance of each settings dataclass.

    Args:
        argv: Arguments without the program's name: ``[--config FILE] [--key value | --key=value] …``.
            What stands here wins over the file.
        types: The dataclasses; no two may share a field's name.

    Returns:
        One instance a type, in their order.

    Raises:
        ConfigurationError: For an unknown or repeated key, a malformed file, or a
            value that a dataclass refuses.
        SystemExit: After ``--help``.
    """
    parser = _parser(types)
    keys = {field.name for kind in types for field in dataclasses.fields(kind) if field.init}
    config, rest = _split_off_config(argv)
    if config is None and not {"-h", "--help"} & set(rest):
        raise ConfigurationError(
            "--config: missing. Name a YAML file, e.g. --config configs/sentiment_quickstart.yaml."
        )
    words = [] if config is None else _as_words(_read_yaml(config), keys=keys, path=config)
    _refuse_unknown(rest, parser)
    try:
        *settings, unused = parser.parse_args_into_dataclasses(
            args=[*words, *rest], return_remaining_strings=True, look_for_args_file=False
        )
    except ConfigurationError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        # What TrainingArguments objects to, in its own words.
        raise ConfigurationError(f"settings: {error} (from {config} and the command line)") from error
    if unused:
        raise ConfigurationError(
            f"command line: no key takes {quoted(unused)}. Write --key value or --key=value."
        )
    return tuple(settings)


def _parser(types: Sequence[type]) -> Any:
    parser = HfArgumentParser(
        list(types), allow_abbrev=False, description="Settings: YAML, then the command line."
    )
    parser.add_argument("--config", default=argparse.SUPPRESS, help="The YAML file with the run's settings.")

    def refuse(message: str) -> NoReturn:
        raise ConfigurationError(f"settings: {message}. Set it in the YAML file or on the command line.")

    # argparse would print its usage, several screens here, before the message.
    parser.error = refuse
    return parser


def _split_off_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    try:
        known, rest = first.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"--config: {error.message}. Name a YAML file.") from error
    return known.config, rest


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        beside = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigurationError(f"--config {path}: no such file. There are {quoted(beside)} in its folder.")
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"{path}: not YAML ({' '.join(str(error).split())}). Write one 'key: value' a line."
        ) from error
    if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigurationError(f"{path}: holds no settings. Write one 'key: value' a line.")
    seen: set[str] = set()
    for key, _ in node.value:
        # safe_load keeps the last of two equal keys without a word.
        if key.value in seen:
            raise ConfigurationError(
                f"{path}, line {key.start_mark.line + 1}: '{key.value}' is set twice. Remove one."
            )
        seen.add(key.value)
    return content


def _as_words(content: dict[str, Any], *, keys: set[str], path: Path) -> list[str]:
    """Writes the file's settings as command-line words.

    The command line's type conversion is then the only one: YAML 1.1 reads
    ``5e-3`` as a text, argparse reads it as the number that the field wants.
    """
    words = []
    for key, value in content.items():
        if key not in keys:
            raise ConfigurationError(
                f"{path}: unknown key '{key}'. Did you mean {quoted(nearest(str(key), keys))}?"
            )
        if value is None or value == []:
            raise ConfigurationError(f"{path}: '{key}' has no value. Give one, or leave the line out.")
        if isinstance(value, list):
            items = [str(item) for item in value]
            if any(item.startswith("-") for item in items):
                raise ConfigurationError(f"{path}: '{key}': a list item must not start with '-'.")
            words += [f"--{key}", *items]
        elif isinstance(value, dict):
            words.append(f"--{key}={json.dumps(value)}")
        else:
            words.append(f"--{key}={value}")
    return words


def _refuse_unknown(words: Iterable[str], parser: Any) -> None:
    options: set[str] = set(parser._option_string_actions)
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in options:
            raise ConfigurationError(
                f"command line: unknown key '{name}'. Did you mean {quoted(nearest(name, options))}?"
            )
