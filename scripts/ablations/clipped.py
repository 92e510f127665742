"""Finding 4, at small scale: how many gradients Abadi's clipping shortens, and when it is AUTO-V.

Where every gradient of every step is longer than R, min(1, R/‖g‖) is R/‖g‖: both must learn the same weights.
The paper saw that with GPT-2 on E2E and R = 0.1. That model is not run here; a linear head on unit features has
gradients of norm at most 2, which shrink as samples are learned.

Source of the claim: Bu et al. 2022 (arXiv 2206.07136).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.report import Report, table

from ablations.checks import Check, alike, exactly
from ablations.drawing import Line, Panel, draw_panels
from ablations.features import Features
from ablations.pages import finding, progress
from ablations.training import Head, Recipe, Run, accuracy, distance, plan_for, train, with_clipping
from dp_trainer import ClippingFunction, FlatClipping, NormalizingClipping

PAPERS_NORM = 0.1
TOLERANCE, CONTRAST = 1e-4, 0.01
# (Abadi's clipping, AUTO-V) at a clipping norm.
PAIR: tuple[Callable[[float], ClippingFunction], Callable[[float], ClippingFunction]] = (
    FlatClipping,
    NormalizingClipping,
)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The run's numbers; the learning rate is DP-Adam's."""

    epsilon: float = 3.0
    batch: int = 512
    steps: int = 200
    rate: float = 0.01
    norms: tuple[float, ...] = (1e-6, 1e-4, 0.01, PAPERS_NORM, 0.3, 1.0, 1.5)


QUICK = Grid(batch=64, steps=10, rate=0.03, norms=(0.001, PAPERS_NORM, 1.0))


def measure(
    data: Features,
    grid: Grid,
    *,
    pair: tuple[Callable[[float], ClippingFunction], Callable[[float], ClippingFunction]] = PAIR,
) -> Report:
    """Trains both ways at every clipping norm and compares."""
    start = time.perf_counter()
    found = sweep(data, grid, pair)
    checks = judge(found)
    rows = [
        (
            f"{norm:g}",
            f"{flat.clipped[0]:.3f}",
            f"{flat.clipped[-1]:.3f}",
            f"{min(flat.clipped):.3f}",
            f"{distance(flat.weights, normalizing.weights):.2e}",
            f"{accuracy(flat.head, data.validation):.4f}, {accuracy(normalizing.head, data.validation):.4f}",
        )
        for norm, (flat, normalizing) in found.items()
    ]
    plan = plan_for(rows=len(data.train), batch=grid.batch, steps=grid.steps, epsilon=grid.epsilon)
    settings = (
        f"Linear head, DP-Adam, learning rate {grid.rate:g}, B = {grid.batch}, {grid.steps} steps, noise multiplier "
        f"{plan.noise_multiplier:.4g} (ε = {plan.epsilon:.3f}), one seed."
    )
    header = (
        *("R", "clipped at the first step", "at the last", "least"),
        *("distance of Abadi's and AUTO-V's weights", "accuracies"),
    )
    return finding(
        "clipped",
        data=data,
        grid=grid,
        seconds=time.perf_counter() - start,
        checks=checks,
        blocks=[settings, table(header, rows)],
        numbers={f"{norm:g}": {"clipped": flat.clipped} for norm, (flat, _) in found.items()},
        caption="share of the drawn samples whose gradient Abadi's clipping shortened, step by step, for several R.",
        figure=draw(found),
    )


def sweep(
    data: Features,
    grid: Grid,
    pair: tuple[Callable[[float], ClippingFunction], Callable[[float], ClippingFunction]],
) -> dict[float, tuple[Run, Run]]:
    """Both runs of every clipping norm, with the same draws and noise."""
    plan = plan_for(rows=len(data.train), batch=grid.batch, steps=grid.steps, epsilon=grid.epsilon)
    found = {}
    with progress(2 * len(grid.norms), "clipped") as bar:
        for norm in grid.norms:
            runs = []
            for clipping in pair:
                runs.append(
                    train(
                        data.train,
                        Head(width=data.width, classes=data.classes),
                        plan=with_clipping(plan, clipping(norm)),
                        recipe=Recipe(optimizer="Adam", learning_rate=grid.rate),
                        seed=0,
                    )
                )
                bar.update()
            found[norm] = (runs[0], runs[1])
    return found


def judge(found: Mapping[float, tuple[Run, Run]]) -> list[Check]:
    """The equality where all is clipped, and whether the paper's R clips all here."""
    apart = {norm: distance(flat.weights, other.weights) for norm, (flat, other) in found.items()}
    whole = [norm for norm, (flat, _) in found.items() if min(flat.clipped) == 1.0]
    listed = ", ".join(f"{norm:g}" for norm in whole) or "no R that was tried"
    checks = [
        alike(
            f"Where every gradient of every step is clipped (here: {listed}), Abadi's clipping learns AUTO-V's weights",
            same=[apart[norm] for norm in whole],
            other=[apart[norm] for norm in found if norm not in whole],
            tolerance=TOLERANCE,
            contrast=CONTRAST,
            what="distance of weights",
        )
    ]
    if PAPERS_NORM in found:
        least = min(found[PAPERS_NORM][0].clipped)
        checks.append(
            exactly(
                f"R = {PAPERS_NORM:g}, the paper's on E2E, clips every gradient of every step of this head too",
                holds=least == 1.0,
                rule="least share clipped over the steps: 1",
                numbers={"least share": least, "steps": len(found[PAPERS_NORM][0].clipped)},
            )
        )
    return checks


def draw(found: Mapping[float, tuple[Run, Run]]) -> bytes:
    """Share clipped against the step."""
    lines = [
        Line(
            label=f"R = {norm:g}",
            positions=[float(step) for step in range(1, len(flat.clipped) + 1)],
            values=flat.clipped,
        )
        for norm, (flat, _) in found.items()
    ]
    panel = Panel(
        title="Abadi's clipping",
        across="step",
        up="share of gradients clipped",
        lines=lines,
        log_across=False,
    )
    return draw_panels([panel])
