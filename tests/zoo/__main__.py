"""Runs the whole zoo and writes the table of coverage.

::

    python -m tests.zoo --jobs 2 --write docs/coverage.md
    python -m tests.zoo --types gpt2,bert --heads "causal LM"
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import transformers
from transformers.models.llama import modeling_llama  # noqa: F401 - what all models import, once for all processes

from .compare import Case, Outcome, all_cases, run
from .report import coverage_page, reasons

# Cheap and safe here: no thread has been started, and models import their code in the child alone.
_PROCESSES = multiprocessing.get_context("fork")


@dataclass
class _Worker:
    """A process that works through the heads of one model type."""

    cases: list[Case]
    process: BaseProcess
    results: Connection
    since: float = field(default_factory=time.monotonic)


def _work(cases: list[Case], results: Connection) -> None:
    for case in cases:
        results.send(run(case))


def _start(cases: list[Case]) -> _Worker:
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_work, args=(cases, sender), daemon=True)
    process.start()
    sender.close()
    return _Worker(cases, process, receiver)


def run_all(cases: list[Case], *, jobs: int, limit_s: float) -> Iterator[Outcome]:
    """Yields an outcome for each case, in the order of completion. A case that takes too long is stopped."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.model_type, []).append(case)
    waiting = list(groups.values())[::-1]
    workers: list[_Worker] = []
    while waiting or workers:
        while waiting and len(workers) < jobs:
            workers.append(_start(waiting.pop()))
        ready = wait([w.results for w in workers], timeout=1.0)
        for worker in list(workers):
            rest = worker.cases
            if worker.results in ready:
                try:
                    yield worker.results.recv()
                    rest, worker.since = rest[1:], time.monotonic()
                except EOFError:
                    worker.process.join()
                    yield Outcome(rest[0], "error", f"its process ended with {worker.process.exitcode}")
                    rest = _stopped(worker, waiting)
            elif time.monotonic() - worker.since > limit_s:
                yield Outcome(rest[0], "error", f"took longer than {limit_s:g} s")
                rest = _stopped(worker, waiting)
            worker.cases = rest
            if not rest:
                worker.process.join()
                workers.remove(worker)


def _stopped(worker: _Worker, waiting: list[list[Case]]) -> list[Case]:
    worker.process.kill()
    if worker.cases[1:]:
        waiting.append(worker.cases[1:])
    return []


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one case")
    parser.add_argument("--types", help="model types, comma-separated; all by default")
    parser.add_argument("--heads", help="heads, comma-separated; all by default")
    parser.add_argument("--write", type=Path, help="where the table goes")
    return parser.parse_args()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    arguments = _arguments()
    types, heads = (set(v.split(",")) if v else None for v in (arguments.types, arguments.heads))
    cases = [
        case
        for case in all_cases()
        if (types is None or case.model_type in types) and (heads is None or case.head in heads)
    ]
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    started, outcomes = time.monotonic(), []
    for outcome in run_all(cases, jobs=arguments.jobs, limit_s=arguments.limit):
        outcomes.append(outcome)
        if outcome.verdict != "exact":
            _say(f"{len(outcomes)}/{len(cases)} {outcome.case}: {outcome.verdict}: {outcome.reason[:200]}")
    _say(reasons(outcomes))
    _say(f"{time.monotonic() - started:.0f} s")
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(coverage_page(outcomes), encoding="utf-8")
    return int(any(outcome.verdict in ("wrong", "error") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
