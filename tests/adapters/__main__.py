"""Runs the whole table and writes its page.

::

    PYTHONPATH=tests python -m adapters --write docs/peft.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

from .compare import Outcome, run
from .methods import ASKED, MODELS, OTHERS
from .page import peft_page


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="where the page goes")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes: dict[tuple[str, str], Outcome] = {}
    for method in (*ASKED, *OTHERS):
        for title in MODELS:
            outcome = outcomes[method.name, title] = run(method, title)
            sys.stdout.write(f"{method.name} | {title} | {outcome}\n")
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(peft_page(outcomes), encoding="utf-8")
    return int(any(outcome.verdict == "wrong" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
