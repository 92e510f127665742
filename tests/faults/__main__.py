"""Kills runs many times and writes the table: ``PYTHONPATH=tests python -m faults --kills 50 --write docs/faults.md``."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from .kills import Kill, clean_environment, many, table, targets

BEGIN, END = "<!-- kills: begin -->", "<!-- kills: end -->"


def section(kills: list[Kill]) -> str:
    lost = sorted(kill.lost for kill in kills)
    over = sum(kill.spent_after > kill.released for kill in kills)
    faults = sum(bool(kill.faults) for kill in kills)
    return "\n".join(
        [
            f"{len(kills)} kills, {faults} with a fault. Steps lost: median {lost[len(lost) // 2]}, at most {lost[-1]}. "
            f"Resumed with a count above what the weights hold: {over}.",
            "",
            *table(kills),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="the page whose section between the markers is replaced")
    arguments = parser.parse_args()
    clean_environment()
    with tempfile.TemporaryDirectory() as folder:
        kills = many(Path(folder), targets(arguments.kills, arguments.seed), arguments.seed)
    text = section(kills)
    sys.stdout.write(text + "\n")
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        replaced = f"{BEGIN}\n{text}\n{END}"
        page = re.sub(f"{BEGIN}.*{END}", lambda _: replaced, page, flags=re.DOTALL)
        arguments.write.write_text(page, encoding="utf-8")
    return int(any(kill.faults for kill in kills))


if __name__ == "__main__":
    sys.exit(main())
