"""Puts finished runs into one table beside published numbers.

    python scripts/report.py runs/*                               # Markdown on standard output
    python scripts/report.py runs/* --html runs/report.html       # with curves and privacy statements
    python scripts/report.py runs/* --write docs/results.md       # between <!-- results --> and <!-- /results -->
    python scripts/report.py runs/mine --beside mine=e2e_gpt2_eps8

Published numbers are those of the config of a run's name (configs/published.json). Runs in
folders mine, mine.seed1, mine.seed2 are averaged: --seed 1 --output_dir runs/mine.seed1 makes one.
Metrics are computed without noise: on private data they are for your eyes only.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from dp_trainer.errors import ConfigurationError, DPTrainerError
from dp_trainer.tasks.comparison import as_html, as_markdown, read_published, read_run, table

PUBLISHED = Path(__file__).parent.parent / "configs" / "published.json"
SECTION = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", flags=re.DOTALL)


def main(words: list[str]) -> None:
    """Parses, reads, reports."""
    options = parse(words)
    runs = [read_run(folder) for folder in options.runs]
    rows = table(runs, read_published(options.published), beside=dict(map(pair, options.beside)))
    text = as_markdown(rows)
    if options.html:
        options.html.write_text(as_html(runs, rows), encoding="utf-8")
        print(f"wrote {options.html}")
    if options.write:
        replace_section(options.write, text)
        print(f"wrote {options.write}")
    if not options.html and not options.write:
        print(text, end="")


def parse(words: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output folders of scripts/finetune.py"
    )
    parser.add_argument("--published", type=Path, default=PUBLISHED, help="published numbers, as JSON")
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="RUN=ROW", help="other published rows than a run's own"
    )
    parser.add_argument("--html", type=Path, help="write a page with curves and privacy statements")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the results section of this page")
    return parser.parse_args(words)


def pair(word: str) -> tuple[str, str]:
    """Splits RUN=ROW."""
    run, equals, row = word.partition("=")
    if not (run and equals and row):
        raise ConfigurationError(f"--beside {word}: not of the form RUN=ROW.")
    return run, row


def replace_section(page: Path, text: str) -> None:
    """Puts the table between the page's two markers."""
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    if len(SECTION.findall(old)) != 1:
        raise ConfigurationError(
            f"--write {page}: the page needs <!-- results --> and <!-- /results -->, each once on a line of its own."
        )
    page.write_text(SECTION.sub(lambda found: found[1] + text + found[2], old), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DPTrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
