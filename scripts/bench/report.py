"""Numbers to text: medians with quartiles, markdown tables, JSON, and sections of a page."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.device import Device


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median between its quartiles."""

    low: float
    middle: float
    high: float

    def __format__(self, number: str) -> str:
        number = number or ".3f"
        return f"{self.middle:{number}} ({self.low:{number}} to {self.high:{number}})"

    def __str__(self) -> str:
        return format(self)


def spread(values: Sequence[float]) -> Spread:
    """Returns median and quartiles; all lie within the values, however few they are.

    Raises:
        ValueError: For fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no quartiles. Measure at least 2 rounds.")
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low=low, middle=middle, high=high)


def ratios(own: Sequence[float], plain: Sequence[float]) -> Spread:
    """The spread of each round's quotient; a quotient of medians would mix rounds."""
    return spread([a / b for a, b in zip(own, plain, strict=True)])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a markdown table.

    Raises:
        ValueError: If a row has more or fewer cells than the header.
    """
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(header)} columns: {row}")
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def has_section(page: str, name: str) -> bool:
    """Whether the page has the two marks of the section exactly once, in order."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    return page.count(opening) == page.count(closing) == 1 and page.index(opening) < page.index(closing)


def with_section(page: str, name: str, text: str) -> str:
    """Returns the page with the text between ``<!-- name -->`` and ``<!-- /name -->``, all else untouched.

    Raises:
        ValueError: If the page does not have the two marks exactly once.
    """
    if not has_section(page, name):
        raise ValueError(f"the page needs <!-- {name} --> and, after it, <!-- /{name} -->, each once.")
    pattern = f"(<!-- {re.escape(name)} -->).*(<!-- /{re.escape(name)} -->)"
    return re.sub(pattern, lambda found: f"{found[1]}\n{text.strip()}\n{found[2]}", page, flags=re.DOTALL)


def environment(device: Device) -> dict[str, object]:
    """What the figures depend on."""
    libraries = ("torch", "transformers", *(("opacus",) if find_spec("opacus") else ()))
    return {
        "device": device.describe(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
    }


def in_words(settings: dict[str, object]) -> str:
    """One line of settings."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a mode of the benchmark found.

    Args:
        name: The mode; also the name of its section, its JSON file and its figure.
        text: Markdown.
        data: Everything measured, as JSON can hold it.
        figure: A PNG that was drawn, if any.
    """

    name: str
    text: str
    data: object
    figure: bytes | None = None

    def save(self, folder: Path, page: Path | None, device: Device) -> list[Path]:
        """Writes JSON and figure to the folder, text and figure to the page; returns all paths.

        The figure of a page lies in the folder ``figures`` beside it.
        """
        facts = environment(device)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / f"{self.name}.json"]
        written[0].write_text(json.dumps({"environment": facts, self.name: self.data}, indent=2) + "\n")
        targets = [folder / f"{self.name}.png"] if self.figure else []
        if page is not None:
            text = f"*{in_words(facts)}*\n\n{self.text}"
            if self.figure:
                targets.append(page.parent / "figures" / f"{self.name}.png")
                text += f"\n\n![{self.name}](figures/{self.name}.png)"
            page.write_text(with_section(page.read_text(encoding="utf-8"), self.name, text), encoding="utf-8")
            written.append(page)
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.figure or b"")
        return written + targets
