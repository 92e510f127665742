"""How the private step's time over the plain step's moves with length, micro-batch and model size.

A small GPT-2-like model, each axis alone, so that a cliff would show as a jump
between neighbours. Each point has a process of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.cases import small_gpt2
from bench.contenders import plain, private
from bench.device import Device
from bench.figures import Curve, Panel, draw_panels
from bench.measure import in_child, in_turns, repeats_for
from bench.report import Report, ratios, spread, table

# A round of short steps repeats them for so long; shorter rounds would time the machine's noise.
ROUND_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model and micro-batch.

    Args:
        width: Of the residual stream.
        layers: Transformer blocks.
        samples: B.
        length: T, tokens of a sample.
    """

    width: int = 256
    layers: int = 2
    samples: int = 4
    length: int = 128

    def __str__(self) -> str:
        return f"width {self.width}, {self.layers} layers, B {self.samples}, T {self.length}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Points along one axis.

    Args:
        axis: Its name.
        field: The field of ``Point`` that changes along it.
        fixed: What does not change, in words.
        curves: Points by the name of their curve.
    """

    axis: str
    field: str
    fixed: str
    curves: dict[str, list[Point]]


SWEEPS = (
    Sweep(
        axis="tokens of a sample, T",
        field="length",
        fixed="width 256, 2 layers, B 2",
        curves={"": [Point(samples=2, length=2**k) for k in range(6, 13)]},
    ),
    Sweep(
        axis="samples of a micro-batch, B",
        field="samples",
        fixed="width 256, 2 layers, T 128",
        curves={"": [Point(samples=2**k) for k in range(7)]},
    ),
    Sweep(
        axis="width of the model",
        field="width",
        fixed="B 4, T 128",
        curves={
            f"{layers} layers": [Point(width=width, layers=layers) for width in (64, 128, 256, 512, 768)]
            for layers in (2, 8)
        },
    ),
)
# For a look at whether it runs.
TINY_SWEEPS = tuple(
    replace(sweep, curves={name: points[:2] for name, points in sweep.curves.items()}) for sweep in SWEEPS
)


def measure(*, sweeps: Sequence[Sweep], rounds: int, device: Device) -> Report:
    """Measures every point; prints one line each."""
    timed: dict[Point, dict[str, Any]] = {}
    for point in dict.fromkeys(p for sweep in sweeps for points in sweep.curves.values() for p in points):
        settings = {**asdict(point), "rounds": rounds, **asdict(device)}
        found = in_child("scaling", settings, label=str(point))
        if found is not None:
            timed[point] = found
            print(f"{point}: {ratios(found['private'], found['plain'])}", flush=True)
    panels = [panel_of(sweep, timed) for sweep in sweeps]
    data = [{**asdict(point), **found} for point, found in timed.items()]
    return Report(name="scaling", text=page(sweeps, timed), data=data, figure=draw_panels(panels))


def point_task(
    *, width: int, layers: int, samples: int, length: int, rounds: int, name: str, bf16: bool
) -> dict[str, Any]:
    """Times one point in this process; returns seconds by contender, and the number of parameters."""
    device = Device(name=name, bf16=bf16)
    case = small_gpt2(width=width, layers=layers, samples=samples, length=length)
    built = {}
    for key, contender in (("plain", plain), ("private", private)):
        torch.manual_seed(0)
        built[key] = contender(case, device)
        built[key].step(1)
    repeats = repeats_for(functools.partial(built["plain"].step, 1), ROUND_SECONDS, device)
    steps = {key: functools.partial(made.step, 1) for key, made in built.items()}
    seconds = in_turns(steps, rounds=rounds, device=device, repeats=repeats)
    return {**seconds, "parameters": sum(p.numel() for p in built["plain"].model.parameters())}


def panel_of(sweep: Sweep, timed: dict[Point, dict[str, Any]]) -> Panel:
    """The panel of one sweep; points that failed are gaps."""
    curves = []
    for name, points in sweep.curves.items():
        present = [point for point in points if point in timed]
        spreads = [ratios(timed[point]["private"], timed[point]["plain"]) for point in present]
        positions = [getattr(point, sweep.field) for point in present]
        curves.append(Curve(label=name, positions=positions, spreads=spreads))
    return Panel(axis=sweep.axis, fixed=sweep.fixed, curves=curves)


def page(sweeps: Sequence[Sweep], timed: dict[Point, dict[str, Any]]) -> str:
    """One table a sweep."""
    blocks = []
    for sweep in sweeps:
        rows = []
        for points in sweep.curves.values():
            for point in (p for p in points if p in timed):
                found = timed[point]
                ratio = ratios(found["private"], found["plain"])
                plain_ms = f"{1e3 * spread(found['plain']).middle:.1f}"
                rows.append((point, f"{found['parameters'] / 1e6:.2f}M", plain_ms, ratio))
        header = ("point", "parameters", "plain ms", "dp_trainer / plain (quartiles)")
        blocks.append(f"**{sweep.axis}** ({sweep.fixed})\n\n{table(header, rows)}")
    return "\n\n".join(blocks)
