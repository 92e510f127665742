"""Figures as PNG bytes, small enough for a repository."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_DOTS_PER_INCH = 90


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Values over two axes.

    Args:
        title: What the panel shows.
        rows: Labels of the rows, bottom to top.
        columns: Labels of the columns.
        values: One list a row.
        marked: Cells to mark, as (row, column).
    """

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float]]
    marked: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve, with limits where there are any."""

    label: str
    positions: list[float]
    values: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves over one pair of axes; ``levels`` are dashed horizontals."""

    title: str
    across: str
    up: str
    lines: list[Line]
    levels: dict[str, float] = field(default_factory=dict)
    log_across: bool = True
    log_up: bool = False


def draw_heat_maps(maps: Sequence[HeatMap], *, columns: int, across: str, up: str) -> bytes:
    """Panels with one common colour scale; marked cells have a dot."""
    rows = -(-len(maps) // columns)
    figure = _figure(3.1 * columns + 0.8, 2.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    lowest = min(value for each in maps for row in each.values for value in row)
    highest = max(value for each in maps for row in each.values for value in row)
    image: Any = None
    for axis in axes.flat[len(maps) :]:
        axis.remove()
    for axis, each in zip(axes.flat, maps, strict=False):
        image = axis.imshow(each.values, origin="lower", aspect="auto", vmin=lowest, vmax=highest)
        axis.set_title(each.title, fontsize=8)
        axis.set_xticks(range(len(each.columns)), each.columns, fontsize=6, rotation=60)
        axis.set_yticks(range(len(each.rows)), each.rows, fontsize=6)
        if each.marked:
            axis.scatter([c for _, c in each.marked], [r for r, _ in each.marked], s=4, color="white")
    figure.supxlabel(across, fontsize=9)
    figure.supylabel(up, fontsize=9)
    figure.colorbar(image, ax=[axis for axis in axes.flat if axis.figure], label="accuracy", shrink=0.8)
    return _png(figure)


def draw_panels(panels: Sequence[Panel]) -> bytes:
    """Curves side by side, limits as error bars."""
    figure = _figure(4.3 * len(panels), 3.6)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in panel.lines:
            error = None
            if line.low is not None and line.high is not None:
                error = [
                    [value - low for value, low in zip(line.values, line.low, strict=True)],
                    [high - value for value, high in zip(line.values, line.high, strict=True)],
                ]
            marker = "o" if len(line.positions) < 20 else None
            axis.errorbar(
                line.positions,
                line.values,
                yerr=error,
                marker=marker,
                markersize=3,
                capsize=2,
                label=line.label,
            )
        for index, (label, level) in enumerate(panel.levels.items()):
            axis.axhline(level, linestyle="--", color=f"C{len(panel.lines) + index}", label=label)
        axis.set_xscale("log" if panel.log_across else "linear")
        axis.set_yscale("log" if panel.log_up else "linear")
        axis.set_xlabel(panel.across, fontsize=9)
        axis.set_ylabel(panel.up, fontsize=9)
        axis.set_title(panel.title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    # Without pyplot there is no global state to clean up and no window system to choose.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=_DOTS_PER_INCH, format="png")
    return content.getvalue()
