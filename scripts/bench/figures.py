"""Figures as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import Spread


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: a ratio to plain, and peak memory in GiB; ``kind`` decides its colour."""

    label: str
    kind: str
    spread: Spread
    peak: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Ratios to plain along one axis."""

    label: str
    positions: list[float]
    spreads: list[Spread]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves over the same axis."""

    axis: str
    fixed: str
    curves: list[Curve]


def draw_bars(bars: Sequence[Bar], *, kinds: Sequence[str]) -> bytes:
    """Median ratios with quartiles on the left, peak memory on the right."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.2 + 0.3 * len(bars)), sharey=True)
    for row, bar in enumerate(bars):
        color = f"C{kinds.index(bar.kind)}"
        middle = bar.spread.middle
        error = [[middle - bar.spread.low], [bar.spread.high - middle]]
        left.barh(row, middle, xerr=error, color=color, capsize=3)
        left.text(bar.spread.high + 0.02, row, f"{middle:.2f}", va="center", fontsize=8)
        right.barh(row, bar.peak, color=color)
    left.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8)
    left.invert_yaxis()
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("step time / plain step, median with quartiles")
    right.set_xlabel("peak memory, GiB")
    return _png(figure)


def draw_panels(panels: Sequence[Panel]) -> bytes:
    """Ratios over logarithmic axes with one common vertical axis, quartiles as error bars."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for curve in panel.curves:
            middles = [spread.middle for spread in curve.spreads]
            low = [spread.middle - spread.low for spread in curve.spreads]
            high = [spread.high - spread.middle for spread in curve.spreads]
            axis.errorbar(
                curve.positions, middles, yerr=[low, high], marker="o", capsize=3, label=curve.label
            )
        axis.set_xscale("log", base=2)
        ticks = sorted({position for curve in panel.curves for position in curve.positions})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axis.minorticks_off()
        axis.axhline(1, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.set_xlabel(panel.axis)
        axis.set_title(panel.fixed, fontsize=9)
        if len(panel.curves) > 1:
            axis.legend(fontsize=8)
    highest = [spread.high for panel in panels for curve in panel.curves for spread in curve.spreads]
    # After all curves: panels share the axis, and a limit set earlier would cut off later ones.
    axes[0][0].set_ylim(0, 1.08 * max(highest, default=1.0))
    axes[0][0].set_ylabel("step time, dp_trainer / plain")
    return _png(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    plt.close(figure)
    return content.getvalue()
