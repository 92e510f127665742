"""Times whole runs on real text: DPTrainer against the plain Trainer, at the same micro-batch size.

Run through ``scripts/benchmark.py --throughput``. Both train the same randomly
initialised small model for the same number of steps, everything included that
a run pays for: loading batches, padding, the optimizer, and the certificate, a
fixed cost that weighs the less the more steps there are. The plain Trainer pads
random batches; it also runs with its own grouping by length.
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
from transformers import Trainer, TrainingArguments

MICRO_BATCH, ACCUMULATION = 16, 4


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
    """Runs every task whose data and tokenizer are at hand; prints tables, returns seconds and rates."""
    results = {}
    for name, folder, data in (("e2e", gpt2_tokenizer, None), ("sst2", roberta_tokenizer, sst2_data)):
        if folder is None:
            print(f"\n{name}: left out, no tokenizer was given")
            continue
        results[name] = measure_task(RUNS[name], folder, data, rounds, steps)
    return results


def measure_task(run: Run, folder: Path, data: str | None, rounds: int, steps: int) -> dict[str, list[float]]:
    """Returns each contender's samples a second, one a round, contenders taking turns."""
    from dp_trainer.tasks import find_task
    from dp_trainer.tasks.arguments import DataArguments
    from dp_trainer.tasks.loading import load_rows, prepare_splits

    task, tokenizer = find_task(run.task), run.tokenizer(folder)
    rows = load_rows(task, DataArguments(task=run.task, data=data))
    rows = {task.train_split: rows[task.train_split]}
    split = prepare_splits(task, rows, tokenizer, max_length=None)[task.train_split]
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds):
        for name in CONTENDERS[turn % len(CONTENDERS) :] + CONTENDERS[: turn % len(CONTENDERS)]:
            seconds = train(
                name, run.model(tokenizer), split.dataset, task.collator(tokenizer), steps=steps, seed=turn
            )
            rates[name].append(MICRO_BATCH * ACCUMULATION * steps / seconds)
    plain = rates["plain"]
    print(f"\n### {run.task}: whole run, {steps} steps of {MICRO_BATCH} × {ACCUMULATION} samples\n")
    print("| trainer | samples a second, median | against plain |\n| --- | --- | --- |")
    for name, own in rates.items():
        ratio = statistics.median(a / b for a, b in zip(own, plain, strict=True))
        print(f"| {name} | {statistics.median(own):.1f} | {ratio:.2f} |")
    return rates


def train(name: str, model: nn.Module, dataset: Any, collator: Any, *, steps: int, seed: int) -> float:
    """Trains once; returns the seconds of ``train()``."""
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
        torch.manual_seed(seed)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start
