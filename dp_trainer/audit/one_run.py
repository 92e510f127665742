"""Many canaries in one training run, each in or out by a fair coin.

The run is a real one: the run's own sampler, DataLoader, steps and optimizer. The
attacker sees every noised gradient, guesses which canaries were in, and may
abstain. What that implies for ε holds for any training algorithm (Steinke, Nasr
& Jagielski 2023). The rates against the claimed trade-off curve are sharper, and
rest on the canaries' entries being noised and drawn independently, as claimed.

Axes: M canary, T step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import TrainerCallback

from dp_trainer.audit.bounds import one_run_epsilon
from dp_trainer.audit.canaries import TABLE, CanaryTrainer, canary, canary_length
from dp_trainer.audit.curves import ClaimedCurve
from dp_trainer.audit.findings import EpsilonBound, Finding
from dp_trainer.audit.step import CONFIDENCE, AttackResult, contribution, points_at
from dp_trainer.distributed import Ranks
from dp_trainer.privacy.accounting import epsilon
from dp_trainer.privacy.plan import PrivacyPlan
from dp_trainer.trainer import DPTrainer

# Shares of the canaries guessed in and guessed out; fixed before the run, the best counts.
_GUESSES = ((0.02, 0.0), (0.05, 0.0), (0.05, 0.05), (0.15, 0.15), (0.5, 0.5))
_RATES = (0.02, 0.1, 0.4)
_SIMULATED = 20_000
MOST_STEPS = 20


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps what reaches the optimizer at the canaries' entries, one array (M,) a step."""

    def __init__(self, divisor: float, steps: int, quiet: bool) -> None:
        self.rows: list[NDArray[np.float64]] = []
        self._divisor = divisor
        self._progress = tqdm(total=steps, desc="one run", disable=quiet, leave=False)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        grad = getattr(others["model"], TABLE).weight.grad
        self.rows.append(grad[:, 0].detach().double().cpu().numpy() * self._divisor)
        self._progress.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._progress.close()


def attack_one_run(
    audited: DPTrainer,
    *,
    samples: Sequence[Any],
    canaries: int,
    steps: int,
    failure: float,
    quiet: bool = False,
) -> AttackResult:
    """Trains once with canaries and guesses which were in.

    Guarantee: on a correct run the result contradicts the claim with probability at most ``failure``.

    Args:
        audited: The run in question.
        samples: Real samples that train along.
        canaries: Number m of coins.
        steps: Number of releases.
        failure: Allowed probability of a false alarm.
        quiet: No progress bar.
    """
    plan = audited.plan
    coins = np.random.Generator(np.random.Philox(Ranks.current(audited.args.device).shared_key().reveal()))
    inside_M = coins.random(canaries) < 0.5
    length = canary_length(plan.clipping)
    rows = [*samples, *(canary(samples[0], int(entry), length) for entry in np.flatnonzero(inside_M))]
    trainer = CanaryTrainer(audited=audited, samples=rows, entries=canaries, steps=steps, noised=True)
    watch = _Watch(plan.divisor, steps, quiet)
    trainer.add_callback(watch)
    trainer.train()
    distance = contribution(plan.clipping, length) / plan.noise_std
    scores_M = evidence(np.stack(watch.rows) / plan.noise_std, q=plan.sampling_probability, distance=distance)
    curve = ClaimedCurve(plan.mechanism, steps)
    # A third each for points, for the bound on ε, and in reserve for the curve's grid.
    points = points_at(
        "one run",
        inside=inside_M,
        scores=scores_M,
        thresholds=_thresholds(plan, steps, distance, coins),
        curve=curve,
        failure=failure / 3,
    )
    return AttackResult(
        points=points,
        bounds=[_bound(inside_M, scores_M, plan, steps, failure / 3)],
        findings=[_counted(trainer, len(watch.rows), steps)],
        curve=curve,
        title=f"one run of {steps} steps, {canaries} canaries",
    )


def evidence(entries_TM: NDArray[np.float64], *, q: float, distance: float) -> NDArray[np.float64]:
    """Log likelihood ratio of "in" against "out" under the claim, summed over steps, (M,).

    Args:
        entries_TM: Released entries in units of the noise's std.
        q: Sampling probability.
        distance: A canary's contribution in the same unit.
    """
    drawn_TM = distance * entries_TM - distance**2 / 2
    kept = np.log1p(-q) if q < 1 else -np.inf
    ratios: NDArray[np.float64] = np.logaddexp(kept, np.log(q) + drawn_TM).sum(0)
    return ratios


def _thresholds(plan: PrivacyPlan, steps: int, distance: float, coins: np.random.Generator) -> list[float]:
    """Thresholds of the claimed scores of canaries that were out, simulated."""
    out_TM = coins.standard_normal((steps, _SIMULATED))
    scores = evidence(out_TM, q=plan.sampling_probability, distance=distance)
    return [float(np.quantile(scores, 1 - rate)) for rate in _RATES]


def _bound(
    inside_M: NDArray[np.bool_], scores_M: NDArray[np.float64], plan: PrivacyPlan, steps: int, failure: float
) -> EpsilonBound:
    order = np.argsort(-scores_M)

    def at_least(allowed: float) -> float:
        best = 0.0
        for share_in, share_out in _GUESSES:
            first, last = round(share_in * len(order)), round(share_out * len(order))
            right = int(inside_M[order[:first]].sum())
            right += int((~inside_M[order[len(order) - last :]]).sum())
            best = max(
                best,
                one_run_epsilon(
                    canaries=len(order),
                    guesses=first + last,
                    right=right,
                    delta=plan.target_delta,
                    failure=allowed / len(_GUESSES),
                ),
            )
        return best

    return EpsilonBound(
        layer="one_run",
        method="guesses in one run, with abstention",
        confidence=CONFIDENCE,
        at_least=at_least(1 - CONFIDENCE),
        at_confidence_of_verdict=at_least(failure),
        claimed=epsilon(plan.mechanism, steps, plan.target_delta, accountant=plan.accountant),
        delta=plan.target_delta,
    )


def _counted(trainer: CanaryTrainer, seen: int, steps: int) -> Finding:
    counted, taken = trainer.accountant.steps_spent, int(trainer.state.global_step)
    return Finding(
        layer="one_run",
        name="releases counted in training",
        agrees=counted == seen == taken == steps,
        measured=f"{counted} counted, {seen} gradients reached the optimizer, {taken} steps taken",
        claimed=f"{steps} of each",
    )
