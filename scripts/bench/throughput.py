"""Times whole runs on real text: DPTrainer against the plain Trainer, at the same micro-batch size.

All train the same randomly initialised small model for the same number of steps.
One rate is for the whole run, everything included that it pays for: measuring
lengths, the certificate, loading and padding batches, the optimizer. The other
leaves out what comes before the end of the first step, a fixed cost that a long
run does not notice. The plain Trainer pads random batches; it also runs with its
own grouping by length.

A private step gains from sorting and pays for its capture. To tell these apart,
tokens are counted: those computed, padding included, for each real one is
sorting's part, and the time of a computed token is the capture's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from bench.counting import Clock, Counter, Wrapped
from bench.report import Report, Spread, ratios, spread, table
from bench.texts import RUNS, Shape, TextRun
from dp_trainer import DPTrainer, PrivacyArguments
from dp_trainer.tasks import find_task
from dp_trainer.tasks.arguments import DataArguments
from dp_trainer.tasks.loading import load_rows, prepare_splits

MICRO_BATCH = 16
GROUPED, UNSORTED = "plain, grouped by length", "dp_trainer, not sorted"
CONTENDERS = ("plain", GROUPED, "dp_trainer", UNSORTED)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a run: optimizer steps, micro-batches of each as the plain Trainer cuts them, and the model's shape."""

    steps: int
    accumulation: int
    shape: Shape = field(default_factory=Shape)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; all but ``whole_seconds`` is counted from the end of its first step.

    Args:
        whole_samples: Samples of all steps, as expected; a Poisson draw may have some more or fewer.
        whole_seconds: Of the whole run.
        seconds: Of the later steps.
        samples: Drawn for them.
        real_tokens: In these samples.
        computed_tokens: The same with padding.
    """

    whole_samples: int
    whole_seconds: float
    seconds: float
    samples: int
    real_tokens: int
    computed_tokens: int

    @property
    def whole_rate(self) -> float:
        """Samples a second."""
        return self.whole_samples / self.whole_seconds

    @property
    def rate(self) -> float:
        """Samples a second after the first step."""
        return self.samples / self.seconds

    @property
    def padding(self) -> float:
        """Computed tokens for each real one."""
        return self.computed_tokens / self.real_tokens

    @property
    def microseconds(self) -> float:
        """Of a computed token."""
        return 1e6 * self.seconds / self.computed_tokens


def measure(
    *,
    tasks: Sequence[str],
    gpt2_tokenizer: Path | None,
    roberta_tokenizer: Path | None,
    sst2_data: str | None,
    rounds: int,
    steps: int,
    accumulation: int,
    shape: Shape,
) -> Report:
    """Runs every task whose data and tokenizer are at hand; contenders take turns.

    Args:
        tasks: Names in ``RUNS``.
        gpt2_tokenizer: Folder; E2E is left out without it.
        roberta_tokenizer: Folder; SST-2 is left out without it.
        sst2_data: SST-2 as a folder or hub name.
        rounds: Runs of each contender.
        steps: Optimizer steps of a run.
        accumulation: Micro-batches of a step.
        shape: Of all models.
    """
    size = Size(steps=steps, accumulation=accumulation, shape=shape)
    folders = {"e2e": gpt2_tokenizer, "sst2": roberta_tokenizer}
    results: dict[str, dict[str, list[Run]]] = {}
    for name in tasks:
        missing = RUNS[name].missing(folders.get(name))
        if missing:
            print(f"\n{name}: left out, {missing}", flush=True)
            continue
        data = sst2_data if name == "sst2" else None
        results[name] = measure_task(RUNS[name], folders.get(name), data, rounds, size)
    text = "\n\n".join(page(name, runs, size) for name, runs in results.items())
    data = {
        name: {contender: [asdict(run) for run in own] for contender, own in runs.items()}
        for name, runs in results.items()
    }
    return Report(name="throughput", text=text, data=data)


def measure_task(
    run: TextRun, folder: Path | None, data: str | None, rounds: int, size: Size
) -> dict[str, list[Run]]:
    """Returns each contender's runs, one a round."""
    task, tokenizer = find_task(run.task), run.tokenizer(folder)
    rows = load_rows(task, DataArguments(task=run.task, data=data))
    rows = {task.train_split: rows[task.train_split]}
    split = prepare_splits(task, rows, tokenizer, max_length=None)[task.train_split]
    runs: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds):
        shift = turn % len(CONTENDERS)
        for name in CONTENDERS[shift:] + CONTENDERS[:shift]:
            torch.manual_seed(turn)
            model, collator = run.model(tokenizer, size.shape), task.collator(tokenizer)
            runs[name].append(train(name, model, split.dataset, collator, size=size, seed=turn))
            own = runs[name][-1]
            print(f"{run.task}, round {turn + 1}, {name}: {own.rate:.1f} samples a second", flush=True)
    return runs


def train(name: str, model: nn.Module, dataset: Any, collator: Any, *, size: Size, seed: int) -> Run:
    """Trains once and times it."""
    counter = Counter(collator)
    clock = Clock(counter)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=size.accumulation,
            max_steps=size.steps,
            train_sampling_strategy="group_by_length" if name == GROUPED else "random",
            remove_unused_columns=name != UNSORTED,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            seed=seed,
        )
        parts = {"model": model, "args": arguments, "train_dataset": dataset, "data_collator": counter}
        if name == UNSORTED:
            parts["train_dataset"] = Wrapped(dataset)
            parts["data_collator"] = lambda samples: counter([sample["sample"] for sample in samples])
        if name.startswith("dp_trainer"):
            privacy = PrivacyArguments(noise_multiplier=0.6, target_delta=1e-5)
            trainer: Trainer = DPTrainer(**parts, privacy=privacy)
        else:
            trainer = Trainer(**parts)
        trainer.add_callback(clock)
        start = time.perf_counter()
        trainer.train()
        end = time.perf_counter()
    samples, real, computed = (a - b for a, b in zip(counter.counts, clock.counts, strict=True))
    return Run(
        whole_samples=MICRO_BATCH * size.accumulation * size.steps,
        whole_seconds=end - start,
        seconds=end - clock.first_step,
        samples=samples,
        real_tokens=real,
        computed_tokens=computed,
    )


def page(name: str, runs: Mapping[str, list[Run]], size: Size) -> str:
    """Two tables for one task: rates, and what they are made of."""
    plain = runs["plain"]
    rates, parts = [], []
    for contender, own in runs.items():
        cells: list[object] = [contender]
        for kind in ("whole_rate", "rate"):
            cells += [f"{_of(own, kind).middle:.1f}", _against(own, plain, kind)]
        rates.append(cells)
        cost = f"{_of(own, 'microseconds').middle:.1f}"
        parts.append(
            [contender, f"{_of(own, 'padding').middle:.3f}", cost, _against(own, plain, "microseconds")]
        )
    header = ("trainer", "whole run", "against plain", "after the first step", "against plain")
    made_of = ("trainer", "computed tokens for each real one", "µs of a computed token", "against plain")
    title = f"**{name}**, {len(plain)} rounds of {size.steps} steps of {MICRO_BATCH} × {size.accumulation} samples, "
    title += f"{size.shape.layers} layers of width {size.shape.width}"
    return f"{title}; samples a second:\n\n{table(header, rates)}\n\nAfter the first step:\n\n{table(made_of, parts)}"


def _of(runs: Sequence[Run], kind: str) -> Spread:
    return spread([getattr(run, kind) for run in runs])


def _against(own: Sequence[Run], plain: Sequence[Run], kind: str) -> Spread:
    return ratios([getattr(run, kind) for run in own], [getattr(run, kind) for run in plain])
