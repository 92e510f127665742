"""Times whole runs on real text: DPTrainer against the plain Trainer, at the same micro-batch size.

Run through ``scripts/benchmark.py --throughput``. Both train the same randomly
initialised small model for the same number of steps. One rate is for the whole
run, everything included that it pays for: measuring lengths, the certificate,
loading and padding batches, the optimizer. The other leaves out what comes
before the end of the first step, a fixed cost that a long run does not notice.
The plain Trainer pads random batches; it also runs with its own grouping by length.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

MICRO_BATCH, ACCUMULATION = 16, 16


@dataclass(frozen=True, kw_only=True)
class Run:
    """A task on real text, and a small model of the usual shape for it."""

    task: str
    model: Callable[[Any], nn.Module]
    tokenizer: Callable[[Path], Any]


def small_gpt2(tokenizer: Any) -> nn.Module:
    """A GPT-2 of 4 layers and width 128, with the whole vocabulary."""
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_layer=4, n_embd=128, n_head=4, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def small_roberta(tokenizer: Any) -> nn.Module:
    """A RoBERTa of 4 layers and width 128, with the whole vocabulary."""
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=4, hidden_size=128, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=514, type_vocab_size=1, num_labels=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config)


def gpt2_tokenizer(folder: Path) -> Any:
    """Reads GPT-2's tokenizer; it pads with its end token."""
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Samples a second of one run, all of it and without all that comes before its second step."""

    whole: float
    after_first_step: float


class Clock(TrainerCallback):
    """Notes when the first step ends."""

    first_step = 0.0

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        """Called by the Trainer."""
        self.first_step = self.first_step or time.perf_counter()


RUNS = {
    "e2e": Run(task="e2e", model=small_gpt2, tokenizer=gpt2_tokenizer),
    "sst2": Run(
        task="sst2", model=small_roberta, tokenizer=transformers.RobertaTokenizerFast.from_pretrained
    ),
}

CONTENDERS = ("plain", "plain, grouped by length", "dp_trainer")


def measure(
    *,
    gpt2_tokenizer: Path | None,
    roberta_tokenizer: Path | None,
    sst2_data: str | None,
    rounds: int,
    steps: int,
) -> dict[str, Any]:
    """Runs every task whose data and tokenizer are at hand; prints tables and returns the rates."""
    results = {}
    for name, folder, data in (("e2e", gpt2_tokenizer, None), ("sst2", roberta_tokenizer, sst2_data)):
        if folder is None:
            print(f"\n{name}: left out, no tokenizer was given")
            continue
        results[name] = measure_task(RUNS[name], folder, data, rounds, steps)
    return results


def measure_task(run: Run, folder: Path, data: str | None, rounds: int, steps: int) -> dict[str, list[Rates]]:
    """Returns each contender's rates, one a round, contenders taking turns."""
    from dp_trainer.tasks import find_task
    from dp_trainer.tasks.arguments import DataArguments
    from dp_trainer.tasks.loading import load_rows, prepare_splits

    task, tokenizer = find_task(run.task), run.tokenizer(folder)
    rows = load_rows(task, DataArguments(task=run.task, data=data))
    rows = {task.train_split: rows[task.train_split]}
    split = prepare_splits(task, rows, tokenizer, max_length=None)[task.train_split]
    rates: dict[str, list[Rates]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds):
        for name in CONTENDERS[turn % len(CONTENDERS) :] + CONTENDERS[: turn % len(CONTENDERS)]:
            model, collator = run.model(tokenizer), task.collator(tokenizer)
            rates[name].append(train(name, model, split.dataset, collator, steps=steps, seed=turn))
            print(f"{run.task}, round {turn + 1}, {name}: {rates[name][-1]}", flush=True)
    print(f"\n### {run.task}: {steps} steps of {MICRO_BATCH} × {ACCUMULATION} samples; samples a second\n")
    print("| trainer | whole run | against plain | after the first step | against plain |")
    print("| --- | --- | --- | --- | --- |")
    for name, own in rates.items():
        cells = [cell for kind in ("whole", "after_first_step") for cell in _cells(own, rates["plain"], kind)]
        print(f"| {name} | {' | '.join(cells)} |")
    return rates


def _cells(own: list[Rates], plain: list[Rates], kind: str) -> list[str]:
    """A contender's median rate, and the median of its ratios to the plain Trainer's of the same round."""
    ratios = [getattr(a, kind) / getattr(b, kind) for a, b in zip(own, plain, strict=True)]
    return [f"{statistics.median(getattr(a, kind) for a in own):.1f}", f"{statistics.median(ratios):.2f}"]


def train(name: str, model: nn.Module, dataset: Any, collator: Any, *, steps: int, seed: int) -> Rates:
    """Trains once and times it."""
    from dp_trainer import DPTrainer, PrivacyArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=steps,
            train_sampling_strategy="group_by_length" if name == CONTENDERS[1] else "random",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            seed=seed,
        )
        parts = {"model": model, "args": arguments, "train_dataset": dataset, "data_collator": collator}
        if name == "dp_trainer":
            privacy = PrivacyArguments(noise_multiplier=0.6, target_delta=1e-5)
            trainer: Trainer = DPTrainer(**parts, privacy=privacy)
        else:
            trainer = Trainer(**parts)
        clock = Clock()
        trainer.add_callback(clock)
        torch.manual_seed(seed)
        start = time.perf_counter()
        trainer.train()
        end = time.perf_counter()
    samples = MICRO_BATCH * ACCUMULATION
    return Rates(
        whole=samples * steps / (end - start),
        after_first_step=samples * (steps - 1) / (end - clock.first_step),
    )
