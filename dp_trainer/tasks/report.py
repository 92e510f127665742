"""Writes down what a run reached: numbers, history and a plot.

Guarantee: a privacy loss is never shown smaller than it is; ε is rounded up.

None of these files is covered by the privacy guarantee, which is about the
weights: training losses and evaluations are computed on the data without noise.
They are therefore kept out of the folder that holds the model.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.base import Task

LogHistory = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PrivacySpent:
    """What the run cost.

    Attributes:
        epsilon_after: Steps → ε at ``delta``, an upper bound.
        delta: The δ that ε belongs to.
        steps: Steps taken.
        target_epsilon: The budget, or None if the noise was given instead.
    """

    epsilon_after: Callable[[int], float]
    delta: float
    steps: int
    target_epsilon: float | None

    @property
    def epsilon(self) -> float:
        """ε after the steps taken."""
        return self.epsilon_after(self.steps)


def round_up(value: float, digits: int = 3) -> float:
    """Rounds to so many decimals, never down."""
    if not math.isfinite(value):
        return value
    shift = 10.0**digits
    # The tiny allowance keeps 0.1 + 0.2 from becoming 0.301; it is below any grid's accuracy.
    return math.ceil(value * shift - 1e-9) / shift


def metrics_record(
    *,
    task: Task,
    evaluations: Mapping[str, Mapping[str, float]],
    baselines: Mapping[str, float],
    privacy: PrivacySpent | None,
    steps: int,
    seconds: float,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Collects a run's results for metrics.json.

    Args:
        task: The task that was trained.
        evaluations: Split → metrics of the final model, without a prefix.
        baselines: Split → the metric of the best constant answer, where there is one.
        privacy: What was spent; None for a run without privacy.
        steps: Optimizer steps that the weights have seen.
        seconds: Duration of the training.
        settings: What the run was told, as plain values; it makes the numbers repeatable.
    """
    return {
        "task": task.name,
        "metric": task.metric,
        "splits": {
            name: {**metrics, **({"baseline": baselines[name]} if name in baselines else {})}
            for name, metrics in evaluations.items()
        },
        "private": privacy is not None,
        "epsilon": None if privacy is None else privacy.epsilon,
        "delta": None if privacy is None else privacy.delta,
        "steps": steps,
        "training_seconds": seconds,
        "peak_memory_gib": peak_memory_gib(),
        "settings": settings,
    }


def peak_memory_gib() -> float | None:
    """The largest memory that this process has held so far, in GiB: the GPU's, or without one the process's.

    None where the system does not tell.
    """
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    if importlib.util.find_spec("resource") is None:  # Windows
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def summary_lines(record: Mapping[str, Any], metric_label: str) -> list[str]:
    """Says the results in a line a split, and a line on privacy."""
    lines = []
    for name, metrics in record["splits"].items():
        line = f"{name}: {metric_label} {metrics[record['metric']]:.4f}"
        if "baseline" in metrics:
            line += f" (best constant answer {metrics['baseline']:.4f})"
        lines.append(line)
    if record["private"]:
        lines.append(
            f"privacy: ε = {round_up(record['epsilon'])} at δ = {record['delta']:g} after {record['steps']} steps"
        )
    else:
        lines.append("privacy: none; this was an ordinary run for comparison")
    return lines


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON; a number that is not finite becomes null, which every reader understands."""
    path.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_plotting() -> None:
    """Refuses at the start of a run what would otherwise fail at its end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError(
            "plots: needs the package matplotlib. Install it (pip install 'dp_trainer[tasks]') or set plots: false."
        )


def draw_training(
    path: Path, *, history: LogHistory, task: Task, baseline: float | None, privacy: PrivacySpent | None
) -> None:
    """Draws training loss, the task's metric and the privacy spent, each over the steps.

    Args:
        path: The PNG file to write.
        history: The Trainer's ``state.log_history``.
        task: Says which metric to draw.
        baseline: The metric of the best constant answer, drawn as a line; or None.
        privacy: What was spent; None leaves the third panel out.
    """
    # The object interface: pyplot would choose a window system and keep global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = 3 if privacy is not None else 2
    figure = Figure(figsize=(4.2 * panels, 3.4), layout="constrained")
    axes = figure.subplots(1, panels)
    _curve(axes[0], series(history, "loss"), label="training loss", color="tab:gray")
    axes[0].set_title("training loss (not private)", fontsize=10)
    _curve(axes[1], series(history, f"eval_{task.metric}"), label="validation", color="tab:blue")
    if baseline is not None:
        axes[1].axhline(
            baseline,
            color="tab:red",
            linestyle="--",
            linewidth=1,
            label=f"best constant answer {baseline:.3f}",
        )
    axes[1].set_title(f"validation {task.metric_label}", fontsize=10)
    if privacy is not None:
        _privacy_panel(axes[2], privacy)
    for axis in axes:
        axis.set_xlabel("step (one release each)" if privacy is not None else "step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def series(history: LogHistory, key: str) -> list[tuple[int, float]]:
    """Returns (step, value) of one logged quantity; a step's last entry counts."""
    values = {int(entry["step"]): float(entry[key]) for entry in history if key in entry and "step" in entry}
    return sorted(values.items())


def evaluation_at(history: LogHistory, step: int) -> dict[str, float] | None:
    """Returns the validation metrics logged at that step, without their prefix; None if there are none."""
    for entry in reversed(history):
        if entry.get("step") == step and any(key.startswith("eval_") for key in entry):
            return {
                key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")
            }
    return None


def _curve(axis: Any, points: Sequence[tuple[int, float]], *, label: str, color: str) -> None:
    if not points:
        axis.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axis.transAxes)
        return
    steps, values = zip(*points, strict=True)
    axis.plot(
        steps,
        values,
        color=color,
        label=label,
        linewidth=1.6,
        marker="o" if len(points) <= 30 else None,
        markersize=3,
    )


def _privacy_panel(axis: Any, privacy: PrivacySpent) -> None:
    # A few dozen points draw the curve; each costs an accountant's evaluation.
    count = min(privacy.steps, 40)
    steps = sorted({round(i * privacy.steps / count) for i in range(1, count + 1)}) if count else []
    _curve(axis, [(step, privacy.epsilon_after(step)) for step in steps], label="spent", color="tab:green")
    if privacy.target_epsilon is not None:
        axis.axhline(
            privacy.target_epsilon,
            color="tab:red",
            linestyle="--",
            linewidth=1,
            label=f"budget {privacy.target_epsilon:g}",
        )
    axis.set_ylim(bottom=0)
    axis.set_title(f"ε at δ = {privacy.delta:g}", fontsize=10)
