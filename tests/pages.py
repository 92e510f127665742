"""Pages of documentation that are measured, not written by hand."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def write_page(page: Callable[[], str], *, description: str | None) -> None:
    """Makes a page and writes it to the place that the command line names, or prints it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", type=Path, help="where the page goes")
    arguments = parser.parse_args()
    text = page()
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    else:
        print(text)  # noqa: T201
