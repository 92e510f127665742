"""What each config spends: ``python tests/config_plans.py --write docs/configs.md``.

The numbers are those that ``DPTrainer`` works out before it trains: same arguments, same plan.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from dp_trainer.arguments import PrivacyArguments
from dp_trainer.privacy.plan import PrivacyPlan, make_plan
from dp_trainer.privacy.sampling import steps_per_epoch
from dp_trainer.tasks.arguments import DataArguments, GenerationArguments, ModelArguments, RunArguments
from dp_trainer.tasks.config import parse_configuration

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
TYPES = (
    *(ModelArguments, DataArguments, RunArguments, GenerationArguments),
    *(TrainingArguments, PrivacyArguments),
)
# Training samples, as the data's own pages give them; E2E before rows beyond max_length are dropped.
SIZES = {
    "e2e": 42_061,
    "sst2": 67_349,
    "qnli": 104_743,
    "qqp": 363_846,
    "mnli": 392_702,
    "sentiment": 17_345,
    "cifar10": 50_000,
    # A folder of the user's; Imagenette's size, so that there is something to reckon with.
    "image_folder": 9_469,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one YAML file says, read as ``scripts/finetune.py`` reads it."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    generation: GenerationArguments
    training: TrainingArguments
    privacy: PrivacyArguments

    @property
    def expected_batch_size(self) -> int:
        stated = self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps
        return self.privacy.expected_batch_size or stated

    @property
    def dataset_size(self) -> int:
        return self.data.max_train_samples or SIZES[self.data.task]

    @property
    def steps(self) -> int:
        if self.training.max_steps > 0:
            return self.training.max_steps
        each = steps_per_epoch(self.dataset_size, self.expected_batch_size)
        return math.ceil(self.training.num_train_epochs * each)

    def plan(self) -> PrivacyPlan:
        """The run's numbers on the whole data set."""
        return _plan(self.privacy, self.dataset_size, self.expected_batch_size, self.steps)


@cache
def _plan(privacy: PrivacyArguments, size: int, batch: int, steps: int) -> PrivacyPlan:
    return make_plan(privacy, dataset_size=size, expected_batch_size=batch, steps=steps)


def read(path: Path, *words: str) -> Settings:
    """Reads a config; ``words`` stand for the rest of the command line."""
    model, data, run, generation, training, privacy = parse_configuration(
        ["--config", str(path), *words], TYPES
    )
    return Settings(
        model=model, data=data, run=run, generation=generation, training=training, privacy=privacy
    )


def header(path: Path) -> str:
    """The comment at the top, as one line of words."""
    lines = path.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return re.sub(r"\s+", " ", " ".join(line.removeprefix("#") for line in lines[:count])).strip()


def page() -> str:
    """Returns the table as Markdown."""
    lines = [
        "# Configs and what they spend",
        "",
        "N training samples, expected logical batch B, sampling probability q = B/N, steps T, noise multiplier σ",
        "calibrated to the target, and ε by PLD after all steps; each config's header holds the command and the",
        "published figure. Written by `make configs`; `tests/test_configs.py` runs two steps of each on a toy model.",
        "",
        "| config | clipping | N | B | q | T | δ | σ | ε |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(path) for path in CONFIGS]
    return "\n".join(lines) + "\n"


def _row(path: Path) -> str:
    settings = read(path)
    size, batch = settings.dataset_size, settings.expected_batch_size
    link = f"[{path.stem}](../configs/{path.name})"
    if not settings.run.private:
        return f"| {link} | none | {size:,} | {batch:,} |  | {settings.steps:,} |  |  | no privacy |"
    plan = settings.plan()
    cells: list[Any] = [link, plan.clipping.describe()["name"], f"{size:,}", f"{batch:,}"]
    cells += [f"{plan.sampling_probability:.5f}", f"{plan.steps:,}", f"{plan.target_delta:g}"]
    cells += [f"{plan.noise_multiplier:.4f}", f"{plan.epsilon:.3f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page to write; standard output without it")
    target = parser.parse_args().write
    if target is None:
        sys.stdout.write(page())
    else:
        target.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
