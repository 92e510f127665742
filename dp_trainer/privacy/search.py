"""What a hyper-parameter search costs: every trial reads the data, also those that are thrown away.

Two ways to count. *All trials:* their releases compose, as if every trial were published;
this holds for any way of choosing the next trial. *Random number of trials:* where only the best is
kept and nobody could foresee how many there would be, the best of many costs little more than
two or three of them (``RandomTrials``).

Both cover the training set. The scores by which trials are compared are computed from
evaluation data, which neither protects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.accounting import (
    EpsilonCurve,
    Mechanism,
    epsilon_of_divergences,
    renyi_divergences,
    rounded_up,
)
from dp_trainer.privacy.plan import PrivacyPlan
from dp_trainer.privacy.sampling import fresh_key


@dataclass(frozen=True)
class RandomTrials:
    """A number of trials drawn by chance, geometric, from the operating system's entropy.

    Guarantee: if every trial has the same mechanism and steps, chooses its other settings independently by
    a fixed public distribution, runs to its end, and only the best is released, then that release
    has the ε of ``search_cost``, by Rényi divergences.

    Args:
        mean: Expected number of trials, above 1. Half of all searches have fewer than 0.7 times as many.

    Raises:
        ConfigurationError: If ``mean`` is not a finite number above 1.

    Source: Papernot & Steinke 2021 (arXiv 2110.03620), after Liu & Talwar 2019.
    """

    mean: float

    def __post_init__(self) -> None:
        usable = isinstance(self.mean, int | float) and not isinstance(self.mean, bool)
        if not (usable and math.isfinite(self.mean) and self.mean > 1):
            raise ConfigurationError(
                f"RandomTrials.mean is {self.mean!r}. It must be a number above 1, such as 10."
            )

    def draw(self) -> int:
        """Returns the number of trials of one search; secret until the search has ended, and best kept so."""
        generator = np.random.Generator(np.random.Philox(key=fresh_key().reveal()))
        return int(generator.geometric(1.0 / self.mean))


@dataclass(frozen=True, kw_only=True)
class SearchCost:
    """What a search has spent on the training set.

    Args:
        trials: Trials that were begun.
        epsilon: ε of what may be released, an upper bound.
        delta: δ of the same.
        released: What may be released for it, in words.
    """

    trials: int
    epsilon: float
    delta: float
    released: str

    def __str__(self) -> str:
        return (
            f"a hyper-parameter search of {self.trials} trials: ε = {rounded_up(self.epsilon)} at δ = {self.delta:g} "
            f"for {self.released}, in place of one trial's"
        )


def search_cost(
    trials: Sequence[tuple[PrivacyPlan, int]], *, number: RandomTrials | None = None
) -> SearchCost:
    """Works out what a search has spent.

    Args:
        trials: For each trial its plan and the releases it made.
        number: How the number of trials was drawn; None for a number that was fixed, or hung on results.

    Raises:
        ConfigurationError: If there was no trial; with ``number``, if trials differ in their mechanism or length.
    """
    if not trials:
        raise ConfigurationError("search_cost: there was no trial. Count after the first one.")
    if number is not None:
        return _best_of_random(trials, number)
    first = trials[0][0]
    delta = first.target_delta
    if all((plan.mechanism, plan.target_delta) == (first.mechanism, delta) for plan, _ in trials):
        steps = sum(made for _, made in trials)
        curve = EpsilonCurve(first.mechanism, horizon=max(1, steps), accountant=first.accountant)
        total = curve.epsilon(steps, delta)
    else:
        # Mechanisms that hang on earlier results compose by adding what each was allowed at most.
        total = sum(plan.epsilon for plan, _ in trials)
        delta = sum(plan.target_delta for plan, _ in trials)
    return SearchCost(trials=len(trials), epsilon=total, delta=delta, released="all its trials together")


def _best_of_random(trials: Sequence[tuple[PrivacyPlan, int]], number: RandomTrials) -> SearchCost:
    first = trials[0][0]
    for index, (plan, made) in enumerate(trials):
        if plan.identity() != first.identity() or not made == plan.steps == first.steps:
            raise ConfigurationError(
                f"RandomTrials: trial {index} has another mechanism or number of steps than the first ({made} of "
                f"{plan.steps} made), so the trials are not draws of one distribution. Search only settings that leave "
                "batch, epochs and noise alone, and let every trial run to its end; or give a fixed n_trials."
            )
    epsilon = math.inf
    if first.mechanism.noise_multiplier > 0.0:
        epsilon = best_of_random_epsilon(
            first.mechanism, first.steps, first.target_delta, mean_trials=float(number.mean)
        )
    return SearchCost(
        trials=len(trials), epsilon=epsilon, delta=first.target_delta, released="the best trial alone"
    )


def best_of_random_epsilon(mechanism: Mechanism, steps: int, delta: float, *, mean_trials: float) -> float:
    """ε of the best of a geometric number of runs of so many steps each.

    Source: Papernot & Steinke 2021 (arXiv 2110.03620), Theorem 2.
    """
    orders, one_step = renyi_divergences(mechanism)
    run = steps * one_step
    # Each trial is the last with probability 1 / mean_trials.
    halting = 2.0 * np.min((1.0 - 1.0 / orders) * run + math.log(mean_trials) / orders)
    best = run + math.log(mean_trials) / (orders - 1.0) + halting
    return epsilon_of_divergences(orders.tolist(), best.tolist(), delta)
