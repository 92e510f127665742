"""Finding 3: weight decay that is added to the gradient competes with R; decoupled decay does not.

With automatic clipping the noised mean is proportional to R. Adam divides out a common factor of R·g and
λ·θ, so only λ/R is left. AdamW shrinks the weights by itself, so R drops out and λ stays. SGD keeps both:
(η, R, λ) acts as (η/k, k·R, k·λ).

Source of the claims: Bu et al. 2022 (arXiv 2206.07136).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.report import Report
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
from dp_trainer import AutomaticClipping

BASE = 4
TOLERANCE, CONTRAST = 1e-4, 0.1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Exponents of 4 and the run's numbers."""

    epsilon: float = 3.0
    batch: int = 512
    steps: int = 40
    norms: tuple[int, ...] = (-3, -2, -1, 0, 1, 2)
    decays: tuple[int, ...] = (-6, -5, -4, -3, -2, -1, 0, 1, 2)
    adaptive_rate: int = -3
    descent_rate: int = 1


QUICK = Grid(batch=64, steps=6, norms=(-1, 0, 1), decays=(-2, -1, 0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One run by the exponents of R, of the decay λ and of the learning rate."""

    optimizer: str
    norm: int
    decay: int
    rate: int
    accuracy: float
    weights: Tensor


def measure(data: Features, grid: Grid, *, optimizers: Mapping[str, Build] = OPTIMIZERS) -> Report:
    """Runs the sweep and judges it."""
    start = time.perf_counter()
    cells = sweep(data, grid, optimizers=optimizers)
    by_name = {n: [c for c in cells if c.optimizer == n] for n in ("Adam", "AdamW", "SGD")}
    caption = (
        "accuracy by weight decay λ and clipping norm R under automatic clipping; equal λ lie in a row, equal λ/R on a "
        "rising diagonal."
    )
    plan = plan_for(rows=len(data.train), batch=grid.batch, steps=grid.steps, epsilon=grid.epsilon)
    settings = (
        f"Linear head from zero, AUTO-S, B = {grid.batch}, {grid.steps} steps, noise multiplier "
        f"{plan.noise_multiplier:.4g} (ε = {plan.epsilon:.3f}), learning rate {power(BASE, grid.adaptive_rate)} for Adam and "
        f"AdamW, whose denominators hold 1e-20 instead of 1e-8."
    )
    return finding(
        "weight_decay",
        data=data,
        grid=grid,
        seconds=time.perf_counter() - start,
        checks=judge(by_name),
        blocks=[settings],
        numbers=[{n: v for n, v in vars(cell).items() if n != "weights"} for cell in cells],
        caption=caption,
        figure=draw(by_name, grid),
    )


def sweep(data: Features, grid: Grid, *, optimizers: Mapping[str, Build]) -> list[Cell]:
    """Adam and AdamW over decay and R; SGD along the line on which all three settings change."""
    wanted = [
        (name, norm, decay, grid.adaptive_rate)
        for name, norm, decay in itertools.product(("Adam", "AdamW"), grid.norms, grid.decays)
    ]
    middle = grid.decays[len(grid.decays) // 2]
    wanted += [("SGD", norm, middle + norm, grid.descent_rate - norm) for norm in grid.norms]
    # The same R and λ with the learning rate left alone: what need not agree.
    wanted += [("SGD", norm, middle + norm, grid.descent_rate) for norm in grid.norms if norm]
    plan = plan_for(rows=len(data.train), batch=grid.batch, steps=grid.steps, epsilon=grid.epsilon)
    cells = []
    with progress(len(wanted), "weight_decay") as bar:
        for name, norm, decay, rate in wanted:
            run = train(
                data.train,
                Head(width=data.width, classes=data.classes),
                plan=with_clipping(plan, AutomaticClipping(clipping_norm=float(BASE) ** norm)),
                recipe=Recipe(
                    optimizer=name,
                    learning_rate=float(BASE) ** rate,
                    weight_decay=float(BASE) ** decay,
                    stability=NEARLY_ZERO,
                ),
                seed=0,
                optimizers=optimizers,
            )
            score = accuracy(run.head, data.validation)
            cells.append(
                Cell(optimizer=name, norm=norm, decay=decay, rate=rate, accuracy=score, weights=run.weights)
            )
            bar.update()
    return cells


def judge(cells: Mapping[str, Sequence[Cell]]) -> list[Check]:
    """One claim an optimizer."""
    claims: dict[str, tuple[str, Callable[[Cell], int], Callable[[Cell], int]]] = {
        "Adam": (
            "DP-Adam with L2 decay: weights depend on λ/R alone",
            lambda cell: cell.decay - cell.norm,
            lambda cell: cell.decay,
        ),
        "AdamW": (
            "DP-AdamW with decoupled decay: weights do not depend on R",
            lambda cell: cell.decay,
            lambda cell: cell.decay - cell.norm,
        ),
        "SGD": (
            "DP-SGD with L2 decay: (η, R, λ) acts as (η/k, k·R, k·λ)",
            lambda cell: cell.rate + cell.norm,
            lambda cell: cell.rate,
        ),
    }
    return [
        alike(
            claim,
            same=distances(cells[name], same),
            other=distances(cells[name], other),
            tolerance=TOLERANCE,
            contrast=CONTRAST,
            what="distance of weights",
        )
        for name, (claim, same, other) in claims.items()
    ]


def distances(cells: Sequence[Cell], key: Callable[[Cell], int]) -> list[float]:
    """Distances of the weights of all pairs with the same key."""
    return [distance(a.weights, b.weights) for a, b in itertools.combinations(cells, 2) if key(a) == key(b)]


def draw(cells: Mapping[str, Sequence[Cell]], grid: Grid) -> bytes:
    """One panel for each kind of decay."""
    titles = {"Adam": "DP-Adam, decay in the gradient", "AdamW": "DP-AdamW, decoupled decay"}
    maps = []
    for name, title in titles.items():
        own = {(cell.decay, cell.norm): cell.accuracy for cell in cells[name]}
        maps.append(
            HeatMap(
                title=title,
                rows=[power(BASE, decay) for decay in grid.decays],
                columns=[power(BASE, norm) for norm in grid.norms],
                values=[[own[decay, norm] for norm in grid.norms] for decay in grid.decays],
            )
        )
    return draw_heat_maps(maps, columns=2, across="clipping norm R", up="weight decay λ")
