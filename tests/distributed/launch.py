"""Starts several processes of a script, and gives back what they left or how they ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """How a launch ended.

    Args:
        code: The launcher's exit code; None if it had to be stopped.
        seconds: How long it took.
        output: All that was printed.
    """

    code: int | None
    seconds: float
    output: str


def launch(script: str, *arguments: str, processes: int, timeout: float = 400.0, **environment: str) -> Ended:
    """Runs ``torchrun`` on a script of this folder, on the CPU, one thread a process."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(processes), "--master-port", "0", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "localhost:0", str(HERE / script), *arguments),
    ]
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)]),
        **environment,
    }
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        output, code = process.communicate()[0], None
    return Ended(code, time.monotonic() - start, output)


def leave() -> NoReturn:
    """Ends one of the processes, its results written, without taking the interpreter down: see ``leave_ranks``.

    DTensor keeps groups of sharded models for good, and so their Gloo threads.
    """
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
