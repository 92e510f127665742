"""Finding 6: at a fixed ε, larger batches and more steps, up to full batches.

The noise multiplier that ε needs grows slower than the batch, so each update's noise, σ·R/B, falls.

One run is also made by ``DPTrainer`` itself, with full batches and a known noise seed, and its weights held
against this folder's loop: what the loop finds, the product does.

Source of the claim: Li et al. 2021 (arXiv 2110.05679), Bu et al. 2022 (arXiv 2206.07136).
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from bench.report import Report, table

from ablations.checks import Check, bounded, exactly, falling, interval, unpaired_difference
from ablations.drawing import Line, Panel, draw_panels
from ablations.features import Features, Split
from ablations.pages import finding, progress
from ablations.training import Head, Recipe, accuracy, distance, losses_of, plan_for, train
from dp_trainer import PrivacyArguments
from dp_trainer.privacy.plan import PrivacyPlan

SAME = 1e-4
# More samples would only take longer to collate.
_TRAINER_SAMPLES = 2000
Planner = Callable[..., PrivacyPlan]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Batch sizes (0: all samples), steps and the rest; learning rates are DP-Adam's."""

    epsilon: float = 3.0
    batches: tuple[int, ...] = (128, 512, 2048, 0)
    steps: tuple[int, ...] = (10, 40, 160)
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    seeds: int = 4
    trainer_steps: int = 5


QUICK = Grid(batches=(8, 64, 0), steps=(4, 32), rates=(0.01, 0.1), seeds=3, trainer_steps=2)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One batch size and number of steps, at the learning rate that did best on the tuning split.

    Args:
        noise: Std of the noise on each entry of one update's gradient, σ·R/B.
        accuracies: On the validation split, one a seed.
    """

    batch: int
    steps: int
    noise_multiplier: float
    noise: float
    epsilon: float
    rate: float
    tuning: float
    accuracies: list[float]


def measure(data: Features, grid: Grid, *, planner: Planner = plan_for) -> Report:
    """Runs the grid, and DPTrainer beside the loop."""
    start = time.perf_counter()
    cells = sweep(data, grid, planner)
    few = data.train.part(0, min(_TRAINER_SAMPLES, len(data.train)))
    apart = trainer_distance(few, data.classes, steps=grid.trainer_steps, epsilon=grid.epsilon)
    rows = [
        (
            cell.batch,
            cell.steps,
            f"{cell.noise_multiplier:.4g}",
            f"{cell.noise:.3e}",
            f"{cell.noise / math.sqrt(cell.steps):.3e}",
            f"{cell.epsilon:.3f}",
            f"{cell.rate:g}",
            f"{interval(cell.accuracies):.4f}",
        )
        for cell in cells
    ]
    header = ("B", "T", "σ", "σ/B", "σ/(B√T)", "ε", "learning rate", "accuracy (95 % interval)")
    caption = (
        "left, noise of one update at the same ε against the batch size; right, mean accuracy with 95 % intervals over "
        "seeds; one curve for each number of steps, the last point of each with full batches."
    )
    words = (
        f"Linear head, AUTO-S (R = 1), DP-Adam, target ε = {grid.epsilon:g}, {grid.seeds} seeds; σ calibrated by the package "
        "for each B and T."
    )
    return finding(
        "batch",
        data=data,
        grid=grid,
        seconds=time.perf_counter() - start,
        checks=[*judge(cells), same_as_trainer(apart, grid.trainer_steps)],
        blocks=[words, table(header, rows)],
        numbers={"cells": [asdict(cell) for cell in cells], "distance to DPTrainer": apart},
        caption=caption,
        figure=draw(cells),
    )


def sweep(data: Features, grid: Grid, planner: Planner) -> list[Cell]:
    """All cells, batch sizes ascending within each number of steps."""
    sizes = sorted(batch or len(data.train) for batch in grid.batches)
    cells = []
    with progress(len(sizes) * len(grid.steps) * len(grid.rates) * grid.seeds, "batch") as bar:
        for steps, batch in itertools.product(grid.steps, sizes):
            plan = planner(rows=len(data.train), batch=batch, steps=steps, epsilon=grid.epsilon)
            tried = []
            for rate in grid.rates:
                tuning, validation = [], []
                for seed in range(grid.seeds):
                    run = train(
                        data.train,
                        Head(width=data.width, classes=data.classes),
                        plan=plan,
                        recipe=Recipe(optimizer="Adam", learning_rate=rate),
                        seed=seed,
                    )
                    tuning.append(accuracy(run.head, data.tuning))
                    validation.append(accuracy(run.head, data.validation))
                    bar.update()
                tried.append((statistics.fmean(tuning), rate, validation))
            tuned, rate, validation = max(tried)
            cells.append(
                Cell(
                    batch=batch,
                    steps=steps,
                    noise_multiplier=plan.noise_multiplier,
                    noise=plan.noise_std / plan.divisor,
                    epsilon=plan.epsilon,
                    rate=rate,
                    tuning=tuned,
                    accuracies=validation,
                )
            )
    return cells


def judge(cells: Sequence[Cell]) -> list[Check]:
    """Noise first, which has no chance in it, then accuracies."""
    by_steps = grouped(cells, lambda cell: cell.steps)
    by_batch = grouped(cells, lambda cell: cell.batch)
    by_work = grouped(cells, lambda cell: cell.steps * cell.batch)
    largest, longest = max(by_batch), max(by_steps)
    checks = [
        falling(
            "At the same ε and T, the noise of an update falls as B grows",
            [[cell.noise for cell in own] for own in by_steps.values()],
            what="σ·R/B",
        ),
        falling(
            "At the same ε and the same number of gradients B·T, σ/(B√T) falls as B grows",
            [
                [cell.noise / math.sqrt(cell.steps) for cell in sorted(own, key=lambda cell: cell.batch)]
                for own in by_work.values()
            ],
            what="σ·R/(B√T)",
        ),
    ]
    for steps, own in by_steps.items():
        checks.append(
            _better(f"T = {steps}: full batches do better than B = {own[0].batch}", own[-1], own[0])
        )
    for batch, own in by_batch.items():
        name = "full batches" if batch == largest else f"B = {batch}"
        checks.append(_better(f"{name}: {longest} steps do better than {own[0].steps}", own[-1], own[0]))
    return checks


def _better(claim: str, first: Cell, second: Cell) -> Check:
    found = unpaired_difference(first.accuracies, second.accuracies)
    return bounded(claim, found, low=0.0, high=math.inf, what="difference of accuracies")


def grouped(cells: Sequence[Cell], key: Callable[[Cell], int]) -> dict[int, list[Cell]]:
    """Cells by a key, in their order."""
    return {value: [c for c in cells if key(c) == value] for value in dict.fromkeys(map(key, cells))}


def trainer_distance(data: Split, classes: int, *, steps: int, epsilon: float) -> float:
    """Relative distance of the weights that ``DPTrainer`` and the loop learn from the same noise."""
    import datasets
    from transformers import PrinterCallback, TrainingArguments

    from dp_trainer import DPTrainer

    privacy = PrivacyArguments(
        target_epsilon=epsilon, target_delta=1e-5, sampling="full_batch", insecure_noise_seed=0
    )
    width = data.features.shape[1]
    columns: Mapping[str, object] = {"features": data.features.numpy(), "labels": data.labels.numpy()}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=512,
            max_steps=steps,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            label_names=["labels"],
        )
        trainer = DPTrainer(
            model=Head(width=width, classes=classes),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict(dict(columns)).with_format("torch"),
            compute_loss_func=losses_of,
            privacy=privacy,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    theirs = train(data, Head(width=width, classes=classes), plan=trainer.plan, seed=0,
                   recipe=Recipe(optimizer="AdamW", learning_rate=0.01))  # fmt: skip
    head = trainer.accelerator.unwrap_model(trainer.model)
    own = [parameter.detach().double().flatten() for parameter in head.parameters()]
    return distance(torch.cat(own), theirs.weights)


def same_as_trainer(apart: float, steps: int) -> Check:
    """Whether the product learns what the loop learns."""
    return exactly(
        f"DPTrainer with full batches learns the loop's weights in {steps} steps of AdamW",
        holds=apart <= SAME,
        rule=f"relative distance of weights: at most {SAME:g}",
        numbers={"distance": apart},
    )


def draw(cells: Sequence[Cell]) -> bytes:
    """Noise and accuracy against the batch size."""
    noise, accuracies = [], []
    for steps, own in grouped(cells, lambda cell: cell.steps).items():
        positions = [float(cell.batch) for cell in own]
        label = f"T = {steps}"
        noise.append(Line(label=label, positions=positions, values=[cell.noise for cell in own]))
        limits = [interval(cell.accuracies) for cell in own]
        accuracies.append(
            Line(
                label=label,
                positions=positions,
                values=[each.mean for each in limits],
                low=[each.low for each in limits],
                high=[each.high for each in limits],
            )
        )
    panels = [
        Panel(title="noise of one update", across="batch size B", up="σ·R/B", lines=noise, log_up=True),
        Panel(title="accuracy", across="batch size B", up="accuracy", lines=accuracies),
    ]
    return draw_panels(panels)
