"""Clocks, memory, and processes of their own.

Contenders that are compared take turns in one process, so that a busy machine
slows both alike, and each time is divided by the plain step's of the same round.
Memory is a matter of the whole process, so one contender is alone in its own.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.device import Device

SCRIPT = Path(__file__).parent.parent / "benchmark.py"

Seconds = dict[str, list[float]]


def in_turns(
    steps: Mapping[str, Callable[[], object]], *, rounds: int, device: Device, repeats: int = 1
) -> Seconds:
    """Times steps that take turns; who begins changes every round.

    Args:
        steps: Each has run before: the first step allocates optimizer state.
        rounds: Times measured for each.
        device: Waited for before the clock is read.
        repeats: Steps a round, for steps too short to time alone.

    Returns:
        Seconds a step, one entry a round.
    """
    seconds: Seconds = {name: [] for name in steps}
    for turn in range(rounds):
        for name in steps if turn % 2 else reversed(steps):
            seconds[name].append(_seconds(steps[name], repeats, device))
    return seconds


def repeats_for(step: Callable[[], object], least_seconds: float, device: Device) -> int:
    """How often to repeat a step so that a round lasts so many seconds, at least once."""
    return max(1, math.ceil(least_seconds / _seconds(step, 1, device)))


def _seconds(step: Callable[[], object], repeats: int, device: Device) -> float:
    device.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    device.synchronize()
    return (time.perf_counter() - start) / repeats


# glibc gives freed memory back at once, and getting it again costs up to a tenth of a step; whose step that is
# depends on who freed last. So timed processes keep what they freed, whoever runs in them.
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11)}


def in_child(task: str, settings: Mapping[str, Any], *, label: str, keeps_memory: bool = True) -> Any:
    """Runs one measurement in a process of its own.

    A contender that cannot take a model, or runs out of memory, must not end the others.

    Args:
        task: Name of the measurement, see ``benchmark.CHILD_TASKS``.
        settings: Its keyword arguments, as JSON can hold them.
        label: Names the measurement where it fails.
        keeps_memory: Off where memory itself is measured, which is to be what users see.

    Returns:
        Its result; None, after a printed line with the reason, if the process failed.
    """
    command = [sys.executable, str(SCRIPT), "--child", json.dumps({"task": task, "settings": dict(settings)})]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**(KEEPS_MEMORY if keeps_memory else {}), **os.environ},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        print(f"\n{label} ended with code {done.returncode}: {reason}", flush=True)
        return None
    # Libraries may have printed before it.
    return json.loads(done.stdout.strip().splitlines()[-1])
