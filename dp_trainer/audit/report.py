"""Writes an audit down: JSON, a page of prose and a plot.

Guarantee: a claimed ε is never shown smaller than it is, a lower bound never larger.
None of it is covered by the run's own guarantee: contributions are measured on
real samples without noise.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dp_trainer.audit.findings import AttackPoint
from dp_trainer.audit.run import AuditReport
from dp_trainer.audit.step import AttackResult
from dp_trainer.privacy.accounting import rounded_up

_MARKS = ("o", "s", "^")


def write_report(report: AuditReport, folder: Path, *, plot: bool) -> list[Path]:
    """Writes ``audit.json`` and ``audit.md``, and ``audit.png`` if there was an attack to draw.

    Args:
        report: What was found.
        folder: Where to; made if missing.
        plot: Whether to draw; needs matplotlib.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "audit.json", folder / "audit.md"]
    text = json.dumps(_finite(report.describe()), indent=1, ensure_ascii=False, allow_nan=False)
    files[0].write_text(text + "\n", encoding="utf-8")
    files[1].write_text("\n".join(prose(report)) + "\n", encoding="utf-8")
    if plot and report.attacks:
        files.append(folder / "audit.png")
        draw(files[-1], report)
    return files


def prose(report: AuditReport) -> list[str]:
    """The audit in Markdown: verdict, what the attacks reached, every measurement."""
    layers = ", ".join(report.arguments.audit_layers)
    lines = [
        "# Audit",
        "",
        f"**{report.verdict}** (layers: {layers}).",
        "",
        "An audit can refute a privacy claim, not prove it. Contradictions are called with at most "
        f"{report.arguments.audit_false_alarm:g} chance of a false alarm; lower bounds on ε hold with the confidence stated.",
    ]
    lines += [f"- {line}" for line in report.contradictions[1:]]
    if report.bounds:
        lines += ["", "| attack | ε at least | confidence | claimed at most | δ |", "|---|---|---|---|---|"]
        lines += [
            f"| {b.layer}: {b.method} | {_rounded_down(b.at_least)} | {b.confidence:.0%} | {rounded_up(b.claimed)} "
            f"| {b.delta:g} |"
            for b in report.bounds
        ]
    if report.findings:
        lines += ["", "| layer | what | measured | claimed | |", "|---|---|---|---|---|"]
        lines += [
            f"| {f.layer} | {f.name} | {f.measured} | {f.claimed} | {'agrees' if f.agrees else 'CONTRADICTS'} |"
            for f in report.findings
        ]
    return lines


def draw(path: Path, report: AuditReport) -> None:
    """Draws each attack's rates with their confidence bounds beside the claimed trade-off curve.

    Args:
        path: The PNG file to write.
        report: What was found; at least one attack.
    """
    # The object interface: pyplot would choose a window system and keep global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(report.attacks), 4.4), layout="constrained")
    panels = figure.subplots(1, len(report.attacks), squeeze=False)[0]
    for axis, attack in zip(panels, report.attacks.values(), strict=True):
        _panel(axis, attack)
    figure.suptitle(report.verdict if len(report.verdict) < 90 else report.verdict[:87] + "…", fontsize=9)
    figure.savefig(path, dpi=150)


def _panel(axis: Any, attack: AttackResult) -> None:
    curve = attack.curve
    axis.fill_between(curve.rates, curve.powers, 1.0, color="tab:red", alpha=0.08, linewidth=0)
    axis.plot(curve.rates, curve.powers, color="tab:red", linewidth=1.2, label="claimed: at most this")
    axis.plot([0, 1], [0, 1], color="tab:gray", linestyle=":", linewidth=1, label="guessing")
    for mark, setting in zip(_MARKS, dict.fromkeys(p.setting for p in attack.points), strict=False):
        points = [p for p in attack.points if p.setting == setting]
        observed = [_observed(p) for p in points]
        axis.errorbar(
            [x for x, _ in observed],
            [y for _, y in observed],
            xerr=[
                [0.0] * len(points),
                [p.largest_false_positive_rate - x for p, (x, _) in zip(points, observed, strict=True)],
            ],
            yerr=[
                [y - p.smallest_true_positive_rate for p, (_, y) in zip(points, observed, strict=True)],
                [0.0] * len(points),
            ],
            fmt=mark,
            markersize=3,
            linewidth=0.8,
            color="tab:blue" if mark == _MARKS[0] else "tab:green",
            label=f"observed, {setting}",
        )
    axis.set_title(attack.title, fontsize=10)
    axis.set_xlabel("false-positive rate (bar: upper bound)")
    axis.set_ylabel("true-positive rate (bar: lower bound)")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.01)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False, loc="lower right")


def _observed(point: AttackPoint) -> tuple[float, float]:
    return point.false_positives / max(1, point.outs), point.true_positives / max(1, point.ins)


def _rounded_down(value: float) -> str:
    return f"{math.floor(value * 1e3) / 1e3:.3f}"


def _finite(value: Any) -> Any:
    """JSON has no infinity: None in its place."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
