"""Finding 5: γ hardly matters, and AUTO-S is no worse than AUTO-V or Abadi's clipping.

Each way of clipping is given the learning rate that does best on the tuning split, then judged on
the validation split; runs of equal seeds have equal draws and noise, so differences are paired.

Source of the claims: Bu et al. 2022 (arXiv 2206.07136), for RoBERTa on GLUE.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from bench.report import Report, table

from ablations.checks import Check, bounded, interval, paired_difference
from ablations.drawing import Line, Panel, draw_panels
from ablations.features import Features
from ablations.pages import finding, progress
from ablations.training import Head, Recipe, accuracy, plan_for, train, with_clipping
from dp_trainer import AutomaticClipping, ClippingFunction, FlatClipping, NormalizingClipping

# A point more or less is what "hardly matters" is taken to mean, half a point what "no worse" allows.
HARDLY, NO_WORSE = 0.01, 0.005
CLAIMED = (1e-3, 1e-1)
USUAL = 0.01

GAMMAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ARMS: Mapping[str, ClippingFunction] = {
    **{f"AUTO-S, γ = {gamma:g}": AutomaticClipping(gamma=gamma) for gamma in GAMMAS},
    "AUTO-V": NormalizingClipping(),
    "Abadi, R = 0.1": FlatClipping(0.1),
    "Abadi, R = 1": FlatClipping(1.0),
}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The run's numbers; learning rates are DP-Adam's."""

    epsilon: float = 3.0
    batch: int = 512
    steps: int = 80
    seeds: int = 6
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)


QUICK = Grid(batch=64, steps=8, seeds=3, rates=(0.03,))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of clipping at its best learning rate: accuracies by seed."""

    clipping: ClippingFunction
    rate: float
    tuning: list[float]
    validation: list[float]


def measure(data: Features, grid: Grid, *, arms: Mapping[str, ClippingFunction] = ARMS) -> Report:
    """Trains every arm and compares."""
    start = time.perf_counter()
    found = sweep(data, grid, arms)
    plan = plan_for(rows=len(data.train), batch=grid.batch, steps=grid.steps, epsilon=grid.epsilon)
    settings = (
        f"Linear head, DP-Adam, B = {grid.batch}, {grid.steps} steps, noise multiplier {plan.noise_multiplier:.4g} "
        f"(ε = {plan.epsilon:.3f}), {grid.seeds} seeds. Intervals are over noise and draws, for this one validation set."
    )
    rows = [
        (name, f"{arm.rate:g}", f"{interval(arm.validation):.4f}", f"{statistics.fmean(arm.tuning):.4f}")
        for name, arm in found.items()
    ]
    header = ("clipping", "learning rate", "accuracy (95 % interval)", "on the tuning split")
    caption = "mean accuracy with 95 % intervals over seeds against γ of AUTO-S, AUTO-V and Abadi's clipping as dashed lines."
    return finding(
        "gamma",
        data=data,
        grid=grid,
        seconds=time.perf_counter() - start,
        checks=judge(found),
        blocks=[settings, table(header, rows)],
        numbers={
            name: {"rate": arm.rate, "tuning": arm.tuning, "validation": arm.validation}
            for name, arm in found.items()
        },
        caption=caption,
        figure=draw(found),
    )


def sweep(data: Features, grid: Grid, arms: Mapping[str, ClippingFunction]) -> dict[str, Arm]:
    """Every arm at the learning rate that does best on the tuning split, by its mean over seeds."""
    plan = plan_for(rows=len(data.train), batch=grid.batch, steps=grid.steps, epsilon=grid.epsilon)
    found = {}
    with progress(len(arms) * len(grid.rates) * grid.seeds, "gamma") as bar:
        for name, clipping in arms.items():
            tried = []
            for rate in grid.rates:
                arm = Arm(clipping=clipping, rate=rate, tuning=[], validation=[])
                for seed in range(grid.seeds):
                    run = train(
                        data.train,
                        Head(width=data.width, classes=data.classes),
                        plan=with_clipping(plan, clipping),
                        recipe=Recipe(optimizer="Adam", learning_rate=rate),
                        seed=seed,
                    )
                    arm.tuning.append(accuracy(run.head, data.tuning))
                    arm.validation.append(accuracy(run.head, data.validation))
                    bar.update()
                tried.append(arm)
            found[name] = max(tried, key=lambda arm: statistics.fmean(arm.tuning))
    return found


def judge(found: Mapping[str, Arm]) -> list[Check]:
    """γ within its claimed range, and AUTO-S at its usual γ against the others."""
    automatic = {
        arm.clipping.gamma: arm for arm in found.values() if isinstance(arm.clipping, AutomaticClipping)
    }
    usual = automatic[USUAL]
    checks = [
        bounded(
            f"AUTO-S: γ = {gamma:g} instead of {USUAL:g} changes accuracy by at most a point",
            paired_difference(arm.validation, usual.validation),
            low=-HARDLY,
            high=HARDLY,
            what="paired difference of accuracies",
        )
        for gamma, arm in automatic.items()
        if gamma != USUAL and CLAIMED[0] <= gamma <= CLAIMED[1]
    ]
    checks += [
        bounded(
            f"AUTO-S (γ = {USUAL:g}) is no more than half a point below {name}",
            paired_difference(usual.validation, arm.validation),
            low=-NO_WORSE,
            high=math.inf,
            what="paired difference of accuracies",
        )
        for name, arm in found.items()
        if not isinstance(arm.clipping, AutomaticClipping)
    ]
    return checks


def draw(found: Mapping[str, Arm]) -> bytes:
    """Accuracy against γ."""
    arms = [(a.clipping.gamma, a) for a in found.values() if isinstance(a.clipping, AutomaticClipping)]
    limits = [interval(arm.validation) for _, arm in arms]
    line = Line(
        label="AUTO-S",
        positions=[gamma for gamma, _ in arms],
        values=[each.mean for each in limits],
        low=[each.low for each in limits],
        high=[each.high for each in limits],
    )
    others = {
        name: statistics.fmean(arm.validation)
        for name, arm in found.items()
        if not isinstance(arm.clipping, AutomaticClipping)
    }
    panel = Panel(title="γ of automatic clipping", across="γ", up="accuracy", lines=[line], levels=others)
    return draw_panels([panel])
