"""Writes the table of faults: ``PYTHONPATH=tests python -m auditing --write docs/audit.md``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tqdm import tqdm

from .faults import FAULTS
from .table import CORRECT, as_markdown, audited, ranks_row, row_of

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m auditing", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="correct runs, for the rate of false alarms")
    parser.add_argument("--write", type=Path, help="the page whose section between the markers is replaced")
    arguments = parser.parse_args()
    rows = [row_of(fault) for fault in tqdm(FAULTS, desc="faults")] + [ranks_row()]
    alarms: list[str] = []
    for run in tqdm(range(arguments.runs), desc="correct runs"):
        alarms += audited(None, **CORRECT[run % len(CORRECT)]).contradictions
    text = as_markdown(rows, alarms, arguments.runs)
    sys.stdout.write("\n".join([text, *alarms]) + "\n")
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        replaced = f"{BEGIN}\n{text}\n{END}"
        page = re.sub(f"{BEGIN}.*{END}", lambda _: replaced, page, flags=re.DOTALL)
        arguments.write.write_text(page, encoding="utf-8")
    return int(bool(alarms) or not all(row.as_expected for row in rows))


if __name__ == "__main__":
    sys.exit(main())
