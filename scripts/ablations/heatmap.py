"""Findings 1 and 2: what the clipping norm R does to the learning rate, optimizer by optimizer.

With every gradient clipped, the noised mean is proportional to R: clipped sum and noise alike. So
R can only act as a factor of the gradient. SGD, with or without momentum, moves by η·R; Adam, AdamW and AdaGrad
divide the factor out, but for the small constant in their denominators.
Learning rates and norms are powers of 4, so that equal products and quotients are equal cells, and
scaling by them rounds nothing.

Source of the claims: Bu et al. 2022 (arXiv 2206.07136).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.report import Report, table
from torch import Tensor

from ablations.checks import Check, alike
from ablations.drawing import HeatMap, draw_heat_maps
from ablations.features import Features
from ablations.pages import finding, power, progress
from ablations.training import (
    NEARLY_ZERO,
    OPTIMIZERS,
    Build,
    Head,
    Recipe,
    accuracy,
    distance,
    plan_for,
    train,
    with_clipping,
)
from dp_trainer import AutomaticClipping, ClippingFunction, FlatClipping

BASE = 4
CLIPPING: Mapping[str, Callable[[float], ClippingFunction]] = {
    "automatic": lambda norm: AutomaticClipping(clipping_norm=norm),
    "flat": FlatClipping,
}
# By optimizer: whether R acts as a factor of the learning rate.
TRADES = {"SGD": True, "SGD with momentum": True, "Adam": False, "AdamW": False, "AdaGrad": False}

EXACT = 1e-4
# Adam's usual 1e-8 in the denominator is felt where R makes gradients small.
NEARLY = 0.05
POINTS = 0.005
# Exponent of what counts as a small R: 1/64, where gradients of the untrained head have norms of about 1.
SMALL = -3


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Exponents of 4 and the run's numbers."""

    epsilon: float = 3.0
    batch: int = 512
    steps: int = 40
    weight_decay: float = 0.01
    norms: tuple[int, ...] = (-5, -4, -3, -2, -1, 0, 1)
    rates: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "SGD": (-2, -1, 0, 1, 2, 3, 4, 5, 6),
            "SGD with momentum": (-3, -2, -1, 0, 1, 2, 3, 4, 5),
            "Adam": (-6, -5, -4, -3, -2, -1, 0),
            "AdamW": (-6, -5, -4, -3, -2, -1, 0),
            "AdaGrad": (-5, -4, -3, -2, -1, 0, 1),
        }
    )


QUICK = Grid(
    batch=64,
    steps=6,
    norms=(-5, -4, 0),
    rates={name: (-1, 1, 3) if trades else (-4, -3, -2) for name, trades in TRADES.items()},
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One run: exponents of R and of the learning rate, and what came out.

    Args:
        least_clipped: The smallest share of clipped gradients over the steps.
        stability: See ``Recipe``.
    """

    optimizer: str
    clipping: str
    norm: int
    rate: int
    stability: float | None
    accuracy: float
    least_clipped: float
    weights: Tensor

    @property
    def scales(self) -> bool:
        """Whether R was a mere factor throughout: always with automatic clipping, else if all were clipped."""
        return self.clipping == "automatic" or self.least_clipped == 1.0


def measure(
    data: Features,
    grid: Grid,
    *,
    optimizers: Mapping[str, Build] = OPTIMIZERS,
    clipping: Mapping[str, Callable[[float], ClippingFunction]] = CLIPPING,
) -> Report:
    """Runs the sweep and judges it."""
    start = time.perf_counter()
    cells = sweep(data, grid, optimizers=optimizers, clipping=clipping)
    usual = [cell for cell in cells if cell.stability is None]
    checks = [
        check
        for name, kind in itertools.product(grid.rates, clipping)
        for check in judge([c for c in cells if (c.optimizer, c.clipping) == (name, kind)])
    ]
    plan = plan_for(rows=len(data.train), batch=grid.batch, steps=grid.steps, epsilon=grid.epsilon)
    privacy = (
        f"Linear head from zero, B = {grid.batch}, {grid.steps} steps, noise multiplier {plan.noise_multiplier:.4g}: what "
        f"ε = {plan.epsilon:.3f} at δ = {plan.target_delta:g} needs. All runs have the same draws and the same noise."
    )
    caption = (
        "accuracy by learning rate η and clipping norm R; equal η lie in a row, equal η·R on a falling diagonal, and white "
        "dots mark runs in which R was a mere factor of every clipped gradient."
    )
    return finding(
        "heatmap",
        data=data,
        grid=grid,
        seconds=time.perf_counter() - start,
        checks=checks,
        blocks=[privacy, best_table(usual)],
        numbers=[{n: v for n, v in vars(cell).items() if n != "weights"} for cell in cells],
        caption=caption,
        figure=draw(usual, grid),
    )


def sweep(
    data: Features,
    grid: Grid,
    *,
    optimizers: Mapping[str, Build],
    clipping: Mapping[str, Callable[[float], ClippingFunction]],
) -> list[Cell]:
    """All runs: the grid, and for adaptive optimizers and automatic clipping a row without the constant."""
    wanted = [
        (name, kind, norm, rate, None)
        for name, rates in grid.rates.items()
        for kind, norm, rate in itertools.product(clipping, grid.norms, rates)
    ]
    wanted += [
        (name, "automatic", norm, rates[len(rates) // 2], NEARLY_ZERO)
        for name, rates in grid.rates.items()
        if not TRADES[name] and "automatic" in clipping
        for norm in grid.norms
    ]
    plan = plan_for(rows=len(data.train), batch=grid.batch, steps=grid.steps, epsilon=grid.epsilon)
    cells = []
    with progress(len(wanted), "heatmap") as bar:
        for name, kind, norm, rate, stability in wanted:
            run = train(
                data.train,
                Head(width=data.width, classes=data.classes),
                plan=with_clipping(plan, clipping[kind](float(BASE) ** norm)),
                recipe=Recipe(
                    optimizer=name,
                    learning_rate=float(BASE) ** rate,
                    weight_decay=grid.weight_decay if name == "AdamW" else 0.0,
                    stability=stability,
                ),
                seed=0,
                optimizers=optimizers,
            )
            cells.append(
                Cell(
                    optimizer=name,
                    clipping=kind,
                    norm=norm,
                    rate=rate,
                    stability=stability,
                    accuracy=accuracy(run.head, data.validation),
                    least_clipped=min(run.clipped),
                    weights=run.weights,
                )
            )
            bar.update()
    return cells


def judge(cells: Sequence[Cell]) -> list[Check]:
    """The claims about one optimizer with one clipping function."""
    name, kind = cells[0].optimizer, cells[0].clipping
    trades, automatic = TRADES[name], kind == "automatic"
    groups = (_product, _rate) if trades else (_rate, _product)
    tail = "η·R alone" if trades else "R"
    verb = ("depend on", "depends on") if trades else ("do not depend on", "does not depend on")
    where = f"DP-{name}, {kind} clipping"
    usual = [cell for cell in cells if cell.stability is None]
    whole = [cell for cell in usual if cell.scales]
    small = usual if automatic else [cell for cell in usual if cell.norm <= SMALL]
    weights = f"weights {verb[0]} {tail}"
    checks = [
        _compare(
            f"{where}{'' if automatic else ' where every gradient is clipped'}: {weights}",
            whole,
            whole,
            groups,
            by=_apart,
            tolerance=EXACT if trades else NEARLY,
        ),
        _compare(
            f"{where}{'' if automatic else f' with R ≤ {power(BASE, SMALL)}'}: accuracy {verb[1]} {tail}",
            small,
            small,
            groups,
            by=_points,
            tolerance=POINTS if automatic else 2 * POINTS,
        ),
    ]
    if automatic and not trades:
        bare = [cell for cell in cells if cell.stability is not None]
        claim = f"{where}: {weights}, to rounding with 1e-20 in the denominator"
        checks.append(_compare(claim, bare, whole, groups, by=_apart, tolerance=EXACT))
    return checks


def _compare(
    claim: str,
    cells: Sequence[Cell],
    elsewhere: Sequence[Cell],
    groups: tuple[Callable[[Cell], int], Callable[[Cell], int]],
    *,
    by: Callable[[Cell, Cell], float],
    tolerance: float,
) -> Check:
    """Pairs of the first grouping should agree, those of the second need not."""
    return alike(
        claim,
        same=[by(a, b) for a, b in pairs(cells, groups[0])],
        other=[by(a, b) for a, b in pairs(elsewhere, groups[1])],
        tolerance=tolerance,
        contrast=2 * NEARLY if by is _apart else 4 * POINTS,
        what="distance of weights" if by is _apart else "difference of accuracies",
    )


def _product(cell: Cell) -> int:
    return cell.norm + cell.rate


def _rate(cell: Cell) -> int:
    return cell.rate


def _apart(first: Cell, second: Cell) -> float:
    return distance(first.weights, second.weights)


def _points(first: Cell, second: Cell) -> float:
    return abs(first.accuracy - second.accuracy)


def pairs(cells: Sequence[Cell], key: Callable[[Cell], int]) -> list[tuple[Cell, Cell]]:
    """All pairs of cells with the same key."""
    return [(a, b) for a, b in itertools.combinations(cells, 2) if key(a) == key(b)]


def best_table(cells: Sequence[Cell]) -> str:
    """The best cell of each map, and how many are as good."""
    rows = []
    for name, kind in dict.fromkeys((cell.optimizer, cell.clipping) for cell in cells):
        own = [cell for cell in cells if (cell.optimizer, cell.clipping) == (name, kind)]
        best = max(own, key=lambda cell: cell.accuracy)
        within = sum(cell.accuracy >= best.accuracy - 2 * POINTS for cell in own)
        rows.append(
            (
                name,
                kind,
                f"{best.accuracy:.4f}",
                f"{power(BASE, best.rate)}, {power(BASE, best.norm)}",
                f"{within} of {len(own)}",
                f"{sum(cell.scales for cell in own)} of {len(own)}",
            )
        )
    header = (
        "optimizer",
        "clipping",
        "best accuracy",
        "its η, R",
        "cells within a point of it",
        "R a mere factor",
    )
    return table(header, rows)


def draw(cells: Sequence[Cell], grid: Grid) -> bytes:
    """One panel for each optimizer and clipping function."""
    kinds = list(dict.fromkeys(cell.clipping for cell in cells))
    maps = []
    for kind, (name, rates) in itertools.product(kinds, grid.rates.items()):
        own = {(c.rate, c.norm): c for c in cells if (c.optimizer, c.clipping) == (name, kind)}
        maps.append(
            HeatMap(
                title=f"DP-{name}, {kind}",
                rows=[power(BASE, rate) for rate in rates],
                columns=[power(BASE, norm) for norm in grid.norms],
                values=[[own[rate, norm].accuracy for norm in grid.norms] for rate in rates],
                marked=[
                    (row, column)
                    for (row, rate), (column, norm) in itertools.product(
                        enumerate(rates), enumerate(grid.norms)
                    )
                    if own[rate, norm].scales
                ],
            )
        )
    return draw_heat_maps(maps, columns=len(grid.rates), across="clipping norm R", up="learning rate η")
