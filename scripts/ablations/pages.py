"""From a finding's checks and figure to its report, and the summary over all findings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.report import Report, table
from tqdm import tqdm

from ablations.checks import Check, checks_table
from ablations.features import Features

SUMMARY = "summary"


def finding(
    name: str,
    *,
    data: Features,
    grid: Any,
    seconds: float,
    checks: Sequence[Check],
    blocks: Sequence[str],
    numbers: object,
    caption: str,
    figure: bytes,
) -> Report:
    """The report of one mode: verdicts, then tables, then the figure's caption.

    Args:
        name: The mode.
        data: What was trained on.
        grid: The mode's settings, a dataclass.
        seconds: How long it took.
        checks: The verdicts.
        blocks: Further markdown.
        numbers: Everything measured, as JSON can hold it.
        caption: One sentence that says what the figure shows.
        figure: The PNG.
    """
    facts = f"{data.describe()}. {seconds:.0f} s."
    text = "\n\n".join([facts, checks_table(checks), *blocks, f"*Figure: {caption}*"])
    content = {
        "data": data.describe(),
        "seconds": seconds,
        "settings": asdict(grid),
        "checks": [check.describe() for check in checks],
        "caption": caption,
        "numbers": numbers,
    }
    return Report(name=name, text=text, data=content, figure=figure)


def progress(total: int, name: str) -> Any:
    """A bar that counts runs."""
    return tqdm(total=total, desc=name, unit="run")


def power(base: int, exponent: int) -> str:
    """A label such as 4^-2."""
    return f"{base}^{exponent}"


def summarise(folder: Path, modes: Sequence[str]) -> Report:
    """One table of all verdicts that lie in the folder, whichever call measured them."""
    found = {}
    for mode in modes:
        path = folder / f"{mode}.json"
        if path.is_file():
            found[mode] = json.loads(path.read_text(encoding="utf-8"))[mode]
    claims = [
        {"mode": mode, "claim": check["claim"], "verdict": check["verdict"]}
        for mode, content in found.items()
        for check in content["checks"]
    ]
    counts = Counter(claim["verdict"] for claim in claims)
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    rows = [(claim["mode"], claim["claim"], f"**{claim['verdict']}**") for claim in claims]
    # Calls with other data may have left their results in the folder.
    data = list(dict.fromkeys(content["data"] for content in found.values()))
    text = f"{len(claims)} claims: {words}.\n\n{table(('mode', 'claim', 'verdict'), rows)}\n\nData: {'; '.join(data)}."
    return Report(name=SUMMARY, text=text, data={"counts": dict(counts), "claims": claims, "data": data})
