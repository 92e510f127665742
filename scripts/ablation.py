"""Shows findings about automatic clipping again, at small scale, with this package's own engine.

    python scripts/ablation.py                          # all modes, on bundled text: about a quarter of an hour
    python scripts/ablation.py --only heatmap gamma
    python scripts/ablation.py --quick                  # smaller grids and fewer rows: a minute or so
    python scripts/ablation.py --quick --synthetic      # without the text encoder
    python scripts/ablation.py --write docs/findings.md

Modes: heatmap (R and the learning rate), weight_decay (R and λ), gamma (γ, AUTO-S against AUTO-V and Abadi),
clipped (how many gradients are clipped), batch (B and T at a fixed ε), convergence (rate in T).
A frozen MiniLM embeds the sentiment snippets once; small heads are trained on that, every update
one release of the package. Noise and draws have fixed keys: nothing here is private, and ε is what the
same run with secret keys would spend. Verdicts are computed from the numbers, by the rules that stand beside them.

Results go to standard output (markdown) and, as JSON and PNG, to --output; ``--write`` also replaces
the modes' sections of that page, and the summary over all modes that lie in --output.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Thread counts are read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from ablations import batch, clipped, convergence, features, gamma, heatmap, weight_decay
from ablations.pages import SUMMARY, summarise
from bench.device import Device
from bench.report import Report, has_section

from dp_trainer import DPTrainerError

MODES: Mapping[str, tuple[Callable[..., Report], Any, Any]] = {
    module.__name__.rpartition(".")[2]: (module.measure, module.Grid(), module.QUICK)
    for module in (heatmap, weight_decay, gamma, clipped, batch, convergence)
}
QUICK_ROWS = 1000
SYNTHETIC_ROWS, SYNTHETIC_WIDTH = 4000, 32


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; unknown flags and names are refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    parser.add_argument(
        "--quick", action="store_true", help="small grids, and few rows unless --rows says more"
    )
    parser.add_argument("--synthetic", action="store_true", help="Gaussian classes instead of embedded text")
    parser.add_argument(
        "--rows", type=int, help="rows to train on, the tuning split included; all if left out"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the modes' sections of this page")
    arguments = parser.parse_args(words)
    if arguments.rows is not None and arguments.rows < 100:
        parser.error("--rows must be at least 100")
    page = arguments.write
    for name in (SUMMARY, *arguments.only) if page else ():
        if not (page.is_file() and has_section(page.read_text("utf-8"), name)):
            parser.error(f"--write {page}: the page needs <!-- {name} --> and <!-- /{name} -->, each once")
    return arguments


def load(arguments: argparse.Namespace) -> features.Features:
    """The features that all modes share."""
    if arguments.synthetic:
        return features.synthetic(rows=arguments.rows or SYNTHETIC_ROWS, width=SYNTHETIC_WIDTH)
    rows = arguments.rows or (QUICK_ROWS if arguments.quick else None)
    return features.sentiment(cache=arguments.output, rows=rows)


def main(words: list[str] | None = None) -> None:
    """Parses, loads, measures, reports."""
    arguments = parse_arguments(words)
    torch.set_num_threads(1)
    data = load(arguments)
    print(data.describe(), flush=True)
    for mode in arguments.only:
        measure, grid, quick = MODES[mode]
        finish(measure(data, quick if arguments.quick else grid), arguments)
    finish(summarise(arguments.output, list(MODES)), arguments)


def finish(report: Report, arguments: argparse.Namespace) -> None:
    """Prints one report and writes its files."""
    print(f"\n## {report.name}\n\n{report.text}\n")
    for path in report.save(arguments.output, arguments.write, Device()):
        print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except DPTrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
