"""From run folders to one table beside published numbers, as Markdown and as a page to look at.

Guarantee: a number stands in the table only if a file of the run, or of the
published figures, holds it. What is missing is an empty cell, and a run without
a privacy statement is shown as having no privacy.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.names import nearest, quoted
from dp_trainer.tasks.report import round_up

# Fractions in metrics.json, percent in tables, as the field prints them.
IN_PERCENT = frozenset({"accuracy", "f1"})
# What the Trainer reports beside the task's metrics.
_NOT_METRICS = ("loss", "runtime", "per_second", "baseline", "epoch", "preparation_time", "memory", "prompts")
# A folder of a further run of the same settings: ``mine.seed1`` stands in the row of ``mine``.
_REPEAT = re.compile(r"\.seed\d+$")
# What repeated runs may differ in: chance, and how they were watched.
_OF_NO_MATTER = (
    *("seed", "data_seed", "disable_tqdm", "logging_steps"),
    *("eval_on_start", "eval_steps", "eval_strategy"),
)
COLUMNS = (
    *("run", "split", "metric", "here", "least to most", "best constant answer", "published"),
    *("ε", "δ", "σ", "steps"),
    *("time", "memory"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run left behind.

    Attributes:
        name: The folder's name, by which published numbers are found.
        folder: Where it lies.
        metrics: ``metrics.json``.
        statement: ``privacy_statement.json``, or None for a run without privacy.
    """

    name: str
    folder: Path
    metrics: Mapping[str, Any]
    statement: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published result.

    Attributes:
        splits: Split → metric → value, accuracy and F1 in percent.
        source: Who published it.
        verified: Whether the figure was read in the source, not recalled.
    """

    splits: Mapping[str, Mapping[str, float]]
    source: str
    verified: bool = field(default=True)


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        ConfigurationError: If it is none, its files are unreadable, or a run that calls
            itself private has no privacy statement or states another ε.
    """
    metrics = _read_json(folder / "metrics.json")
    if metrics is None:
        raise ConfigurationError(
            f"{folder}: no metrics.json, so no finished run. Give the output_dir of scripts/finetune.py."
        )
    statement = _read_json(folder / "privacy_statement.json")
    if metrics.get("private") and statement is None:
        raise ConfigurationError(
            f"{folder / 'privacy_statement.json'}: missing, although the run calls itself private. "
            "Restore it, or leave the run out."
        )
    if not metrics.get("private"):
        # A statement of an earlier run in the same folder says nothing about this one.
        statement = None
    elif statement is not None and statement.get("epsilon") != metrics.get("epsilon"):
        raise ConfigurationError(
            f"{folder}: metrics.json has ε = {metrics.get('epsilon')}, its privacy statement "
            f"{statement.get('epsilon')}. The files belong to different runs; run it again into an empty folder."
        )
    return Run(name=folder.resolve().name, folder=folder, metrics=metrics, statement=statement)


def read_published(path: Path) -> dict[str, Published]:
    """Reads published numbers: config name → result.

    Raises:
        ConfigurationError: If the file is missing or of another form.
    """
    content = _read_json(path)
    if content is None:
        raise ConfigurationError(f"{path}: no such file. Give the JSON file with published numbers.")
    try:
        return {name: Published(**entry) for name, entry in content.items()}
    except TypeError as error:
        raise ConfigurationError(
            f"{path}: not of the form name: {{splits, source, verified}} ({error})."
        ) from error


def table(
    runs: Sequence[Run], published: Mapping[str, Published], *, beside: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """Returns one row for each metric of each split of each run: column → text.

    Runs in folders ``NAME.seed1``, ``NAME.seed2`` share the rows of ``NAME``: means, and
    what lies between the least and the most. Each of them has spent its ε, of which the largest is shown.

    Args:
        runs: In the order of the table.
        published: Config name → published result.
        beside: Run → the published row to hold it against; by default the one of its own name.

    Raises:
        ConfigurationError: If ``beside`` names what is not there, or repeated runs differ in more than their seed.
    """
    beside = beside or {}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_REPEAT.sub("", run.name), []).append(run)
    names = set(groups)
    for run_name, row_name in beside.items():
        for what, name, valid in (("run", run_name, names), ("published row", row_name, published)):
            if name not in valid:
                raise ConfigurationError(
                    f"'{name}': no such {what}. Did you mean {quoted(nearest(name, valid))}?"
                )
    rows = []
    for name, repeats in groups.items():
        for other in repeats[1:]:
            _refuse_unlike(repeats[0], other)
        rows += _rows_of(name, repeats, published.get(beside.get(name, name)))
    return rows


def _refuse_unlike(first: Run, other: Run) -> None:
    """Refuses to average over runs of different settings, splits or privacy."""
    for run in (first, other):
        if "settings" not in run.metrics:
            raise ConfigurationError(
                f"{run.folder}: no settings in metrics.json, so it cannot be averaged with others."
            )
    settings, others = first.metrics["settings"], other.metrics["settings"]
    unlike = [
        key for key in sorted({*settings, *others} - {*_OF_NO_MATTER}) if settings.get(key) != others.get(key)
    ]
    unlike += [
        key for key in ("private", "delta", "steps") if first.metrics.get(key) != other.metrics.get(key)
    ]
    unlike += ["splits"] if set(first.metrics["splits"]) != set(other.metrics["splits"]) else []
    if unlike:
        raise ConfigurationError(
            f"{first.folder} and {other.folder} differ in {quoted(unlike)}, and are named as runs of the same "
            "settings. Rename a folder, or leave it out."
        )


def _rows_of(name: str, runs: Sequence[Run], published: Published | None) -> list[dict[str, str]]:
    rows = []
    shared = _run_cells(runs)
    for split in runs[0].metrics["splits"]:
        found = [run.metrics["splits"][split] for run in runs]
        stated = published.splits.get(split, {}) if published else {}
        names = [key for key in found[0] if not any(part in key for part in _NOT_METRICS)]
        for metric in [*names, *(other for other in stated if other not in names)]:
            values = [one[metric] for one in found if metric in one]
            baseline = found[0].get("baseline") if metric == runs[0].metrics["metric"] else None
            ends = [_shown(metric, end(values)) for end in (min, max)] if len(values) > 1 else []
            row = {
                "run": name,
                "split": split,
                "metric": metric,
                "here": _shown(metric, mean(values) if values else None),
                "least to most": f"{' to '.join(ends)} ({len(values)} runs)" if ends else "",
                "best constant answer": _shown(metric, baseline),
                "published": _published_cell(published, stated.get(metric)),
                **shared,
            }
            rows.append(row)
            # Once a run is enough.
            shared = dict.fromkeys(shared, "")
    return rows


def _run_cells(runs: Sequence[Run]) -> dict[str, str]:
    statements = [run.statement for run in runs if run.statement is not None]
    statement = max(statements, key=lambda stated: float(stated["epsilon"])) if statements else None
    plan = statement["plan"] if statement else {}
    seconds = [
        run.metrics["training_seconds"] for run in runs if run.metrics.get("training_seconds") is not None
    ]
    memory = [
        run.metrics["peak_memory_gib"] for run in runs if run.metrics.get("peak_memory_gib") is not None
    ]
    return {
        "ε": f"{round_up(statement['epsilon'])}" if statement else "none",
        "δ": f"{statement['delta']:g}" if statement else "",
        "σ": f"{plan['noise_multiplier']:.3f}" if plan else "",
        "steps": str(runs[0].metrics.get("steps") or ""),
        "time": _duration(mean(seconds)) if seconds else "",
        "memory": f"{max(memory):.1f} GiB" if memory else "",
    }


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f}" if metric in IN_PERCENT else f"{value:.3f}"


def _published_cell(published: Published | None, value: float | None) -> str:
    if published is None or value is None:
        return ""
    return f"{value:g}" + ("" if published.verified else " (not verified)")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def as_markdown(rows: Iterable[Mapping[str, str]]) -> str:
    """Returns the table as Markdown; columns without any entry are left out."""
    rows = list(rows)
    columns = _used(rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def as_html(runs: Sequence[Run], rows: Iterable[Mapping[str, str]]) -> str:
    """Returns one page that needs nothing else: the table, and each run's curves and statement."""
    rows = list(rows)
    columns = _used(rows)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row[column])}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    details = "".join(_details(run) for run in runs)
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Runs of dp_trainer</title>"
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:75rem}"
        "table{border-collapse:collapse}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left}"
        "pre{white-space:pre-wrap;background:#f6f6f6;padding:1rem}img{max-width:100%}</style>"
        f"<h1>Runs</h1><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{details}</html>\n"
    )


def _details(run: Run) -> str:
    parts = [f"<details><summary>{html.escape(run.name)}</summary>"]
    picture = run.folder / "training.png"
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        parts.append(f"<img alt='training of {html.escape(run.name)}' src='data:image/png;base64,{data}'>")
    prose = run.folder / "privacy_statement.md"
    if run.statement is not None and prose.is_file():
        parts.append(f"<pre>{html.escape(prose.read_text(encoding='utf-8'))}</pre>")
    return "".join([*parts, "</details>"])


def _used(rows: Sequence[Mapping[str, str]]) -> list[str]:
    return [column for column in COLUMNS if any(row[column] for row in rows)]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path}: not JSON ({error}). Restore the file, or run it again.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: no JSON object. Restore the file, or run it again.")
    return content
