"""Where a measurement runs, in which precision, and how its clock and memory are read there."""

from __future__ import annotations

import contextlib
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """The CPU or one GPU.

    Args:
        name: ``"cpu"`` or ``"cuda"``.
        bf16: Whether forward passes run under bfloat16 autocast; weights stay float32.
    """

    name: str = "cpu"
    bf16: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of every forward pass."""
        return torch.autocast(self.name, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def synchronize(self) -> None:
        """Waits until the device has done what it was told; the clock is read only after this."""
        if self.name == "cuda":
            torch.cuda.synchronize()

    def peak_gib(self) -> float:
        """Peak memory so far: of tensors on a GPU, of the whole process on the CPU."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated() / GIB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS counts bytes, others KiB.
        return peak / (GIB if sys.platform == "darwin" else 2**20)

    def describe(self) -> str:
        """The processor that does the work, and the precision."""
        precision = "bfloat16 autocast" if self.bf16 else "float32"
        processor = torch.cuda.get_device_name() if self.name == "cuda" else _cpu()
        return f"{processor}, {precision}"


def _cpu() -> str:
    """The processor's name where the system tells it, else its kind."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
