"""Telling a release with a canary from one without: what one step really gives away.

Each trial has a companion that pulls the canary's entry one way; the canary, if
in, pulls twice as hard the other way. Clipped one by one, the two cancel: the
entry's mean moves by exactly one sensitivity. Clipped together, or not at all,
it moves by more. The released entry is a monotone likelihood-ratio statistic.

Two settings: *alone*, one canary and its companion in a release, as neighbouring
datasets differ; *side by side*, many canaries with entries of their own, which
gives more trials a release. The canary is known to be drawn if it is there, so
the claim is that of the noise alone; sampling is judged by the other layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri  # type: ignore[import-untyped]
from tqdm import tqdm

from dp_trainer.audit.bounds import epsilon_from_rates, rate_at_least, rate_at_most
from dp_trainer.audit.canaries import WEIGHT, CanaryTrainer, canary, canary_length
from dp_trainer.audit.curves import ClaimedCurve, when_drawn
from dp_trainer.audit.findings import AttackPoint, EpsilonBound, Finding
from dp_trainer.distributed import Ranks
from dp_trainer.privacy.clipping import ClippingFunction
from dp_trainer.privacy.gaussian import gaussian_epsilon
from dp_trainer.trainer import DPTrainer

CONFIDENCE = 0.95
# False-alarm rates whose thresholds the claim itself gives; one more threshold comes from a first part of the trials.
_RATES = (0.02, 0.15, 0.4)
_LEARNING_SHARE = 0.2
SETTINGS = ("alone", "side by side")
# Releases with many canaries bring many trials each.
_ALONE_PER_SIDE_BY_SIDE = 4
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """What an attack reached.

    Args:
        points: Its rates beside the claimed curve.
        bounds: Lower bounds on ε.
        findings: Comparisons by the way.
        curve: The claimed curve.
        title: For the plot.
    """

    points: list[AttackPoint]
    bounds: list[EpsilonBound]
    findings: list[Finding]
    curve: ClaimedCurve
    title: str


def attack_step(
    audited: DPTrainer, *, base: Any, releases: int, canaries: int, failure: float, quiet: bool = False
) -> AttackResult:
    """Attacks single releases.

    Guarantee: on a correct run the result contradicts the claim with probability at most ``failure``.

    Args:
        audited: The run in question.
        base: A sample for the columns that the model needs; its content does not matter.
        releases: Releases with one canary; a quarter as many have many.
        canaries: Canaries side by side in the second setting.
        failure: Allowed probability of a false alarm.
        quiet: No progress bar.
    """
    plan = audited.plan
    curve = ClaimedCurve(when_drawn(plan.mechanism), 1)
    coins = np.random.Generator(np.random.Philox(Ranks.current(audited.args.device).shared_key().reveal()))
    # Half for the points, half for the bound on ε; each over both settings.
    each = failure / (2 * len(SETTINGS))
    points = []
    sizes = ((releases, 1), (-(-releases // _ALONE_PER_SIDE_BY_SIDE), canaries))
    for setting, (made, side_by_side) in zip(SETTINGS, sizes, strict=True):
        inside, scores = _trials(audited, base, made, side_by_side, coins, f"step, {setting}", quiet)
        points += _points(setting, inside, scores, _thresholds(audited), curve, each)
    claimed = gaussian_epsilon(1.0 / plan.noise_multiplier, plan.target_delta)

    def at_least(allowed: float) -> float:
        return epsilon_from_rates(points, delta=plan.target_delta, failure=allowed)

    bound = EpsilonBound(
        layer="step",
        method="rates of one release",
        confidence=CONFIDENCE,
        at_least=at_least(1 - CONFIDENCE),
        at_confidence_of_verdict=at_least(failure / 2),
        claimed=claimed,
        delta=plan.target_delta,
    )
    return AttackResult(
        points=points, bounds=[bound], findings=[], curve=curve, title="one release, canary known to be drawn"
    )


def _trials(
    audited: DPTrainer,
    base: Any,
    releases: int,
    canaries: int,
    coins: np.random.Generator,
    what: str,
    quiet: bool,
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether each canary was in, and its released entry in units of the stated std; both of length R·K."""
    length = canary_length(audited.plan.clipping)
    trainer = CanaryTrainer(audited=audited, samples=[base], entries=canaries, steps=releases, noised=True)
    inside = coins.random((releases, canaries)) < 0.5
    scores = np.empty(inside.shape)
    for row in tqdm(range(releases), desc=what, disable=quiet, leave=False):
        samples = [canary(base, entry, length / 2) for entry in range(canaries)]
        samples += [canary(base, entry, -length) for entry in np.flatnonzero(inside[row]).tolist()]
        batch = trainer.batch(samples, samples_per_micro_batch=_BATCH)
        entries = trainer.released(batch, dropout=True)[WEIGHT]
        scores[row] = -entries[:, 0].double().cpu().numpy() / audited.plan.noise_std
    return inside.ravel(), scores.ravel()


def _thresholds(audited: DPTrainer) -> list[float]:
    """Scores above which a canary is said to be in, at the false-alarm rates that the claim implies."""
    plan = audited.plan
    start = -contribution(plan.clipping, canary_length(plan.clipping) / 2) / plan.noise_std
    return [start + float(ndtri(1 - rate)) for rate in _RATES]


def contribution(clipping: ClippingFunction, length: float) -> float:
    """How much of a gradient of this length stays after clipping."""
    return float(clipping(torch.tensor([length]))[0]) * length


def _points(
    setting: str,
    inside: NDArray[np.bool_],
    scores: NDArray[np.float64],
    thresholds: Sequence[float],
    curve: ClaimedCurve,
    failure: float,
) -> list[AttackPoint]:
    """Rates at thresholds that the trials counted had no part in."""
    learning = int(len(scores) * _LEARNING_SHARE)
    seen, seen_in = scores[:learning], inside[:learning]
    chosen = list(thresholds)
    if seen_in.any() and not seen_in.all():
        chosen.append(float(np.median(seen[seen_in]) + np.median(seen[~seen_in])) / 2)
    return points_at(
        setting,
        inside=inside[learning:],
        scores=scores[learning:],
        thresholds=chosen,
        curve=curve,
        failure=failure,
    )


def points_at(
    setting: str,
    *,
    inside: NDArray[np.bool_],
    scores: NDArray[np.float64],
    thresholds: Sequence[float],
    curve: ClaimedCurve,
    failure: float,
) -> list[AttackPoint]:
    """Counts the answers "in" above each threshold, with bounds that all hold but with probability ``failure``."""
    each = failure / (2 * len(thresholds))
    ins, outs = int(inside.sum()), int((~inside).sum())
    points = []
    for threshold in thresholds:
        true = int((scores[inside] > threshold).sum())
        false = int((scores[~inside] > threshold).sum())
        most = rate_at_most(false, outs, each)
        points.append(
            AttackPoint(
                setting=setting,
                false_positives=false,
                outs=outs,
                true_positives=true,
                ins=ins,
                largest_false_positive_rate=most,
                smallest_true_positive_rate=rate_at_least(true, ins, each),
                allowed_true_positive_rate=curve.allowed(most),
            )
        )
    return points
