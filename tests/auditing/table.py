"""Audits every fault and many correct runs, and tells which layer saw what."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from distributed.launch import launch

from dp_trainer.audit.arguments import LAYERS
from dp_trainer.audit.run import AuditReport, audit

from .faults import Fault, planted
from .toy import effort, toy_run

RANKS_FAULT = "one noise key for all ranks (two processes)"
# Correct runs take turns at these.
CORRECT = (
    {},
    {"clipping": "flat", "clipping_norm": 0.1},
    {"sampling": "full_batch", "noise_multiplier": 4.0},
    {"noise_multiplier": 0.6, "expected_batch_size": 60, "clipping": "normalizing"},
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    listed: bool
    expected: tuple[str, ...]
    seen_by: tuple[str, ...]
    layers: tuple[str, ...]
    first: str

    @property
    def as_expected(self) -> bool:
        return set(self.expected) <= set(self.seen_by)


def audited(fault: Fault | None, **privacy) -> AuditReport:
    with tempfile.TemporaryDirectory() as folder, planted(fault):
        return audit(toy_run(folder, **privacy), effort(), quiet=True)


def row_of(fault: Fault) -> Row:
    report = audited(fault)
    seen = tuple(layer for layer in LAYERS if layer in report.layers_that_disagree)
    first = report.contradictions[0] if report.contradictions else "nothing"
    return Row(fault.name, fault.listed, fault.seen_by, seen, LAYERS, first)


def ranks_contradictions(folder: Path, *, plant: bool) -> list[str]:
    """What the exact layer of two processes says."""
    result = folder / "contradictions.txt"
    ended = launch("../auditing/ranks.py", str(result), "plant" if plant else "correct", processes=2)
    assert ended.code == 0, ended.output[-3000:]
    return result.read_text(encoding="utf-8").splitlines()


def ranks_row() -> Row:
    with tempfile.TemporaryDirectory() as folder:
        lines = ranks_contradictions(Path(folder), plant=True)
    return Row(
        RANKS_FAULT, True, ("exact",), ("exact",) if lines else (), ("exact",), (lines or ["nothing"])[0]
    )


def as_markdown(rows: list[Row], alarms: list[str], runs: int) -> str:
    lines = [
        f"{sum(row.as_expected for row in rows)} of {len(rows)} faults seen by the layers that must see them; "
        f"{len(alarms)} false alarms in {runs} correct runs.",
        "",
        "| fault | exact | step | one_run | first finding |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        marks = ["seen" if la in row.seen_by else "–" if la in row.layers else "not run" for la in LAYERS]
        name = row.name if row.listed else f"{row.name} \\*"
        lines.append(f"| {name} | {' | '.join(marks)} | {row.first} |")
    return "\n".join(lines)
