"""Finding 7: with automatic clipping, DP-SGD's gradients shrink with T as SGD's do.

The theory bounds the smallest gradient norm met in T steps by a multiple of T^(-1/4), at learning rates
c/√T, for AUTO-S with a noise multiplier that stays the same for all T, as for SGD. Here a small non-convex head
is trained for several T; the slope of log gradient norm over log T is compared. SGD goes through
the same code, with a clipping norm that no gradient reaches and no noise. The noisy runs have one σ, the one that the
longest run needs for its ε; shorter ones spend less.

Source of the claim: Bu et al. 2022 (arXiv 2206.07136).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.report import Report, table
from scipy import stats

from ablations.checks import Check, Interval, bounded, interval, paired_difference
from ablations.drawing import Line, Panel, draw_panels
from ablations.features import Features
from ablations.pages import finding, progress
from ablations.training import Head, Recipe, gradient_norm, plan_for, train, with_clipping, without_noise
from dp_trainer import AutomaticClipping, FlatClipping
from dp_trainer.privacy.plan import PrivacyPlan

# Gradients of these heads have norms of a few units at most.
UNREACHED = 1e6
THEORY = -0.25
SAME_SLOPE = 0.1
PLAIN = "SGD"

Arm = Callable[[PrivacyPlan], PrivacyPlan]
ARMS: Mapping[str, Arm] = {
    PLAIN: lambda plan: without_noise(with_clipping(plan, FlatClipping(UNREACHED))),
    "AUTO-S without noise": lambda plan: without_noise(with_clipping(plan, AutomaticClipping())),
    "DP-SGD with AUTO-S": lambda plan: with_clipping(plan, AutomaticClipping()),
}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The run's numbers. The learning rate of a run of T steps is c·√(first T / T)."""

    epsilon: float = 3.0
    batch: int = 512
    hidden: int = 16
    steps: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    constants: tuple[float, ...] = (2.0, 8.0)
    seeds: int = 3
    looks: int = 8


QUICK = Grid(batch=64, hidden=4, steps=(8, 16, 32, 64), constants=(2.0,), seeds=3, looks=4)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One arm at its best constant: the smallest gradient norm by seed, then by T."""

    constant: float
    norms: list[list[float]]


def measure(data: Features, grid: Grid, *, arms: Mapping[str, Arm] = ARMS) -> Report:
    """Trains all arms and compares slopes."""
    start = time.perf_counter()
    plan = plan_for(rows=len(data.train), batch=grid.batch, steps=max(grid.steps), epsilon=grid.epsilon)
    curves = sweep(data, grid, plan, arms)
    slopes = {name: [slope(grid.steps, norms) for norms in curve.norms] for name, curve in curves.items()}
    rows = [
        (
            name,
            f"{curve.constant:g}",
            *(f"{statistics.fmean(column):.4g}" for column in zip(*curve.norms, strict=True)),
            f"{interval(slopes[name]):.3f}",
        )
        for name, curve in curves.items()
    ]
    header = ("run", "c", *(f"T = {steps}" for steps in grid.steps), "slope (95 % interval)")
    spent = ", ".join(f"{plan.epsilon_after(steps):.3f}" for steps in grid.steps)
    words = (
        f"Smallest norm of the whole training set's mean gradient met in T steps, mean of {grid.seeds} seeds. Tanh head with "
        f"{grid.hidden} units, SGD without momentum, B = {grid.batch}. With noise: σ = {plan.noise_multiplier:.4g}, ε = "
        f"{spent}. c is the one of {', '.join(f'{c:g}' for c in grid.constants)} with the smallest norms."
    )
    return finding(
        "convergence",
        data=data,
        grid=grid,
        seconds=time.perf_counter() - start,
        checks=judge(slopes),
        blocks=[words, table(header, rows)],
        numbers={
            name: {"constant": curve.constant, "norms": curve.norms, "slopes": slopes[name]}
            for name, curve in curves.items()
        },
        caption=(
            "smallest gradient norm met in T steps against T, both logarithmic, with 95 % intervals over seeds; the last "
            "line falls as T^(-1/4)."
        ),
        figure=draw(curves, grid),
    )


def sweep(data: Features, grid: Grid, plan: PrivacyPlan, arms: Mapping[str, Arm]) -> dict[str, Curve]:
    """Each arm at the constant whose norms have the smallest geometric mean."""
    curves = {}
    with progress(len(arms) * len(grid.constants) * grid.seeds * len(grid.steps), "convergence") as bar:
        for name, arm in arms.items():
            tried = []
            for constant in grid.constants:
                norms = []
                for seed in range(grid.seeds):
                    norms.append([])
                    for steps in grid.steps:
                        rate = constant * math.sqrt(grid.steps[0] / steps)
                        norms[-1].append(_smallest_norm(data, grid, arm(plan), rate, steps, seed))
                        bar.update()
                tried.append(Curve(constant=constant, norms=norms))
            curves[name] = min(tried, key=_size)
    return curves


def _smallest_norm(
    data: Features, grid: Grid, plan: PrivacyPlan, rate: float, steps: int, seed: int
) -> float:
    every = max(1, steps // grid.looks)
    seen = []

    def watch(step: int, head: Head) -> None:
        if step % every == 0:
            seen.append(gradient_norm(head, data.train))

    head = Head(width=data.width, classes=data.classes, hidden=grid.hidden, seed=seed)
    recipe = Recipe(optimizer="SGD", learning_rate=rate)
    train(data.train, head, plan=plan, recipe=recipe, seed=seed, steps=steps, watch=watch)
    return min(seen)


def _size(curve: Curve) -> float:
    return statistics.fmean(math.log(norm) for norms in curve.norms for norm in norms)


def slope(steps: Sequence[int], norms: Sequence[float]) -> float:
    """Slope of the straight line through the logarithms."""
    return float(stats.linregress([math.log(t) for t in steps], [math.log(norm) for norm in norms]).slope)


def judge(slopes: Mapping[str, Sequence[float]]) -> list[Check]:
    """Against the theory's exponent, and against SGD's slope."""
    checks = [
        bounded(
            f"{name}: gradients shrink at least as fast as T^(-1/4)",
            interval(own),
            low=-math.inf,
            high=THEORY,
            what="slope",
        )
        for name, own in slopes.items()
    ]
    checks += [
        bounded(
            f"{name}: no slower than {PLAIN}, within {SAME_SLOPE:g} in the exponent",
            paired_difference(own, slopes[PLAIN]),
            low=-math.inf,
            high=SAME_SLOPE,
            what="paired difference of slopes",
        )
        for name, own in slopes.items()
        if name != PLAIN
    ]
    return checks


def draw(curves: Mapping[str, Curve], grid: Grid) -> bytes:
    """Gradient norm against T."""
    positions = [float(steps) for steps in grid.steps]
    lines, start = [], 0.0
    for name, curve in curves.items():
        limits: list[Interval] = [interval(column) for column in zip(*curve.norms, strict=True)]
        start = max(start, limits[0].mean)
        lines.append(
            Line(
                label=name,
                positions=positions,
                values=[each.mean for each in limits],
                # A logarithmic axis has no place for limits below 0.
                low=[max(each.low, each.mean / 10) for each in limits],
                high=[each.high for each in limits],
            )
        )
    theory = [start * (steps / positions[0]) ** THEORY for steps in positions]
    lines.append(Line(label="T^(-1/4)", positions=positions, values=theory))
    panel = Panel(
        title="convergence", across="steps T", up="smallest gradient norm", lines=lines, log_up=True
    )
    return draw_panels([panel])
