"""Kills runs with SIGKILL, looks at what they left, resumes them, and kills them again.

A kill is one row: what the dead process had counted, what its successor counts,
and, from the journal, how many releases the weights it goes on from really hold.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import child

_TIMEOUT = 120
# A run that was killed after its last checkpoint has nothing left to do, and says so.
_SPENT = f"All {child.STEPS} steps of this run's budget are spent"


@dataclass(frozen=True)
class Kill:
    """One kill and what followed.

    Args:
        place: Where the process was killed; "random" for a time of the parent's choosing.
        step: The step it was in.
        spent_before: What the killed process had counted.
        spent_after: What the resumed one counts, before it goes on; 0 after a start from public weights.
        released: How many releases the weights hold that it resumed from.
        applied: How many releases the killed process's own weights held at most.
        complete: Checkpoints that say they are complete.
        cut_short: Checkpoints that say they are not.
        faults: What was wrong; empty where all went as it must.
    """

    place: str
    step: int
    spent_before: int
    spent_after: int
    released: int
    applied: int
    complete: int
    cut_short: int
    faults: tuple[str, ...]

    @property
    def lost(self) -> int:
        return self.applied - self.released


class Place:
    """A folder in which one training run is killed and resumed, again and again, until it ends."""

    def __init__(self, folder: Path, *, plant: str | None = None) -> None:
        self.folder, self.plant = folder / "run", plant
        self.journal = child.Journal(folder / "journal.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        self.context = multiprocessing.get_context("forkserver")
        # Imported once, in a process without threads, so that a run starts in a second.
        self.context.set_forkserver_preload([child.__name__])

    def start(self, place: str | None = None, steps: int = 0) -> Any:
        process = self.context.Process(
            target=child.go, args=(self.folder, self.journal.path, place, steps, self.plant)
        )
        process.start()
        return process

    def kill(self, place: str, steps: int, random_seconds: float | None = None) -> tuple[Kill | None, str]:
        """Starts or resumes the run, kills it, and looks; None if it ended before."""
        known = len(self.journal.entries())
        process = self.start(None if random_seconds is not None else place, steps)
        ended = self._wait(process, known, "started" if random_seconds is not None else "at")
        if not ended and random_seconds is not None:
            process.join(random_seconds)
            ended = not process.is_alive()
        process.kill()
        process.join()
        fresh = self.journal.entries()[known:]
        errors = [entry["error"] for entry in fresh if "error" in entry]
        if ended:
            return None, next((error for error in errors if _SPENT not in error), "")
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        return self._look(fresh, place if random_seconds is None else "random"), ""

    def finish(self) -> list[str]:
        """Runs to the end without a kill; returns what went wrong."""
        known = len(self.journal.entries())
        process = self.start()
        process.join(_TIMEOUT)
        fresh = self.journal.entries()[known:]
        errors = [entry["error"] for entry in fresh if "error" in entry]
        if errors and _SPENT in errors[0]:
            return []
        faults = errors
        ends = [entry for entry in fresh if "ended" in entry]
        if not faults and (not ends or ends[0]["spent"] != child.STEPS or ends[0]["ended"] != child.STEPS):
            faults.append(f"the run did not end at step {child.STEPS}: {ends}")
        return faults

    def _wait(self, process: Any, known: int, key: str) -> bool:
        """Whether the process ended by itself before it noted the key."""
        limit = time.monotonic() + _TIMEOUT
        while time.monotonic() < limit:
            if any(key in entry for entry in self.journal.entries()[known:]):
                return False
            if not process.is_alive():
                return True
            time.sleep(0.01)
        process.kill()
        raise TimeoutError(f"no {key!r} in {_TIMEOUT} s")

    def _look(self, fresh: list[dict[str, Any]], place: str) -> Kill:
        applied = max((e["releases"] for e in fresh if "releases" in e), default=0)
        marks = [e for e in fresh if "at" in e]
        spent = marks[-1]["spent"] if marks else applied
        complete, cut_short = child.complete_and_not(self.folder)
        faults: list[str] = []
        for folder in complete:
            faults += self._faults_of(folder)
        resumed = complete and max(complete, key=lambda folder: int(folder.name.split("-")[1]))
        released = counted = 0
        if resumed:
            counted = json.loads((resumed / "privacy_record.json").read_text())["steps_spent"]
            with contextlib.suppress(Exception):
                released = self.journal.releases_in(child.loaded(resumed)) or 0
        return Kill(
            place=place,
            step=marks[-1]["step"] if marks else applied + 1,
            spent_before=spent,
            spent_after=counted,
            released=released,
            applied=applied,
            complete=len(complete),
            cut_short=len(cut_short),
            faults=tuple(faults),
        )

    def _faults_of(self, folder: Path) -> list[str]:
        """Whether a complete checkpoint loads, and counts what its weights hold: no less, at most one more."""
        try:
            weights = child.loaded(folder)
        except Exception as error:  # noqa: BLE001
            return [f"{folder.name} says it is complete, and does not load: {type(error).__name__}: {error}"]
        released = self.journal.releases_in(weights)
        counted = json.loads((folder / "privacy_record.json").read_text())["steps_spent"]
        if released is None:
            return [f"{folder.name} holds weights that no run had"]
        if not released <= counted <= released + 1:
            return [f"{folder.name} counts {counted} steps, its weights hold {released} releases"]
        return []


def resumed_as_promised(kill: Kill, started: dict[str, Any]) -> list[str]:
    """The successor's own words against what was found on disk."""
    if (started["spent"], started["released"]) != (kill.spent_after, kill.released):
        return [f"resumed with {started}, the disk said {kill.spent_after} and {kill.released}"]
    return []


def many(folder: Path, targets: Iterable[tuple[str, int]], seed: int = 0) -> list[Kill]:
    """One kill a target, over as many runs as it takes; every one is resumed, and every run brought to its end."""
    chance = random.Random(seed)
    kills: list[Kill] = []
    number, place = 0, Place(folder / "0")
    for name, steps in targets:
        while True:
            known = len(place.journal.entries())
            delay = chance.uniform(0, 0.6) if name == "random" else None
            kill, error = place.kill(name, steps, delay)
            if error:
                raise AssertionError(error)
            starts = [entry for entry in place.journal.entries()[known:] if "started" in entry]
            if kills and starts and known:
                kills[-1] = _with_faults(kills[-1], resumed_as_promised(kills[-1], starts[0]))
            if kill is not None:
                kills.append(kill)
                break
            # The run ended before it came to this place: the next one begins anew.
            shutil.rmtree(place.folder)
            number += 1
            place = Place(folder / str(number))
    faults = place.finish()
    kills[-1] = _with_faults(kills[-1], faults)
    return kills


def _with_faults(kill: Kill, faults: list[str]) -> Kill:
    return Kill(**{**vars(kill), "faults": (*kill.faults, *faults)})


def targets(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Where, and how many steps after the run went on: every place several times, a quarter at random times."""
    chance = random.Random(seed)
    wanted = [child.PLACES[i % len(child.PLACES)] for i in range(count - count // 4)] + ["random"] * (
        count // 4
    )
    chance.shuffle(wanted)
    return [(name, chance.randint(1, 4)) for name in wanted]


def table(kills: Iterable[Kill]) -> list[str]:
    """The rows as Markdown."""
    lines = [
        "| | killed at | in step | counted before | counted on resume | releases in the resumed weights | steps lost | complete checkpoints, all load | cut short | faults |",
        "| --- |" + " --- |" * 9,
    ]
    for index, kill in enumerate(kills, 1):
        cells = (
            *(index, kill.place, kill.step, kill.spent_before, kill.spent_after, kill.released, kill.lost),
            *(kill.complete, kill.cut_short, "; ".join(kill.faults) or "none"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def clean_environment() -> None:
    """What the runs inherit."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
