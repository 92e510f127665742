"""The numbers of a run, fixed before its first step.

``make_plan`` turns settings, dataset size and number of steps into every number
that the mechanism uses. An auditor reads this file for the numbers and
``release.py`` for the tensors.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dp_trainer.errors import ConfigurationError, PrivacyBudgetError
from dp_trainer.privacy.accountant import PrivacyAccountant
from dp_trainer.privacy.accounting import FINE_CELLS, EpsilonCurve, epsilon, rounded_up
from dp_trainer.privacy.calibration import calibrate_noise
from dp_trainer.privacy.clipping import ClippingFunction
from dp_trainer.privacy.mechanism import Mechanism, check_delta, mechanism_of

if TYPE_CHECKING:
    from dp_trainer.arguments import PrivacyArguments

__all__ = ["PrivacyAccountant", "PrivacyPlan", "PrivacyWarning", "make_plan"]


class PrivacyWarning(UserWarning):
    """A legal setting that gives less privacy than it may seem to."""


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Everything that the guarantee of a run depends on.

    Guarantee: ``steps`` releases of a sum of sensitivity ``sensitivity``
    with noise of std ``noise_std``, drawn as stated, are (``epsilon``, ``target_delta``)-private
    with respect to ``neighbouring_relation`` of units. A unit is a sample, or a user with all rows.

    Args:
        privacy_unit: ``"sample"`` or ``"user"``.
        user_column: Column of the training set that names users; None where samples are the unit.
        samples_per_unit: Most rows of one unit in one release; 1 for samples.
        dataset_size: Public number of units N.
        dataset_size_stated: Whether N was stated; else it is counted in the dataset, and taken as public.
        expected_batch_size: B, units in a logical batch.
        sampling: ``"poisson"`` or ``"full_batch"``.
        sampling_probability: q = B / N.
        batch_cap: Most units in a logical batch.
        noise_multiplier: Noise std over sensitivity.
        neighbouring_relation: ``"add_or_remove_one"`` or ``"replace_one"``, under which the sum moves twice as far.
        clipping: The clipping function; owns the sensitivity to one row.
        target_epsilon: The budget, or None.
        target_delta: δ.
        steps_asked: Steps that were asked for.
        steps: Steps that may run: those asked for, or fewer if the budget ends before.
        epsilon: ε after ``steps`` steps, an upper bound.
        grid: Width of the accountant's grid of losses for ``epsilon``; None where it uses none.
        accountant: Which accountant decides.
        noise_is_secure: Whether the noise's key is secret.
        noise_on_grid: Whether the noise withstands a look at its last digits (``secure_noise``).
    """

    privacy_unit: str
    user_column: str | None
    samples_per_unit: int
    dataset_size: int
    dataset_size_stated: bool
    expected_batch_size: int
    sampling: str
    sampling_probability: float
    batch_cap: int
    noise_multiplier: float
    neighbouring_relation: str
    clipping: ClippingFunction
    target_epsilon: float | None
    target_delta: float
    steps_asked: int
    steps: int
    epsilon: float
    grid: float | None
    accountant: str
    noise_is_secure: bool
    noise_on_grid: bool

    @property
    def sensitivity(self) -> float:
        """Most that one unit adds to the clipped sum, an L2 norm in gradient units."""
        return self.samples_per_unit * self.clipping.sensitivity

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each entry of the clipped sum, in gradient units."""
        return self.noise_multiplier * self.sensitivity

    @property
    def divisor(self) -> int:
        """What the noised sum is divided by, in rows: public, and the same whatever was drawn."""
        return self.expected_batch_size * self.samples_per_unit

    @property
    def mechanism(self) -> Mechanism:
        """One step, as the accounting sees it."""
        return Mechanism(
            dataset_size=self.dataset_size,
            sampling=self.sampling,
            sampling_probability=self.sampling_probability,
            batch_cap=self.batch_cap,
            noise_multiplier=self.noise_multiplier,
            neighbouring_relation=self.neighbouring_relation,
        )

    @property
    def is_closed_form(self) -> bool:
        """Whether ε comes from the exact Gaussian formula instead of a numerical accountant."""
        return self._curve.is_closed_form

    @cached_property
    def _curve(self) -> EpsilonCurve:
        return EpsilonCurve(self.mechanism, horizon=self.steps, accountant=self.accountant)

    def epsilon_after(self, steps: int) -> float:
        """An upper bound on ε after that many steps of this plan; fast enough for log lines.

        Raises:
            ConfigurationError: If ``steps`` is not in [0, ``self.steps``].
        """
        if steps == self.steps:
            return self.epsilon
        # Fewer steps never cost more, so the plan's finer bound holds for them too.
        return min(self.epsilon, self._curve.epsilon(steps, self.target_delta))

    def grid_after(self, steps: int) -> float | None:
        """Width of the grid behind ``epsilon_after(steps)``."""
        return self.grid if steps == self.steps else self._curve.grid

    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption."""
        return {
            "privacy_unit": self.privacy_unit,
            "user_column": self.user_column,
            "samples_per_unit": self.samples_per_unit,
            "neighbouring_relation": self.neighbouring_relation,
            "dataset_size": self.dataset_size,
            "expected_batch_size": self.expected_batch_size,
            "sampling": self.sampling,
            "sampling_probability": self.sampling_probability,
            "batch_cap": self.batch_cap,
            "noise_multiplier": self.noise_multiplier,
            "clipping": self.clipping.describe(),
            "target_delta": self.target_delta,
        }

    def describe(self) -> dict[str, Any]:
        """All numbers, ready for JSON (an infinite ε becomes None)."""
        return {
            **self.identity(),
            "dataset_size_stated": self.dataset_size_stated,
            "sensitivity": self.sensitivity,
            "noise_std": self.noise_std,
            "target_epsilon": self.target_epsilon,
            "steps_asked": self.steps_asked,
            "steps": self.steps,
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            "grid": self.grid,
            "accountant": self.accountant,
            "noise_is_secure": self.noise_is_secure,
            "noise_on_grid": self.noise_on_grid,
        }

    def __str__(self) -> str:
        clip = self.clipping.describe()
        settings = ", ".join(f"{name} {value:g}" for name, value in clip.items() if isinstance(value, float))
        budget = "no target" if self.target_epsilon is None else f"target {self.target_epsilon:g}"
        rows = ""
        if self.privacy_unit == "user":
            rows = f", named by '{self.user_column}', at most {self.samples_per_unit} rows of each a step"
        lines = [
            f"Privacy plan (unit: one {self.privacy_unit}; neighbours: "
            + ("replace one)" if self.mechanism.replaces else "add or remove one)"),
            f"  {self.privacy_unit + 's':18} N = {self.dataset_size}"
            + (" (stated)" if self.dataset_size_stated else "")
            + rows,
            f"  logical batch      B = {self.expected_batch_size} expected, at most {self.batch_cap}; {self.sampling}, "
            f"probability {self.sampling_probability:.6g}",
            f"  clipping           {clip['name']} ({settings}); sensitivity {self.sensitivity:g}",
            f"  noise multiplier   {self.noise_multiplier:.5g}; std {self.noise_std:.5g} on the clipped sum",
            f"  steps              {self.steps}",
            f"  privacy            ε ≤ {rounded_up(self.epsilon)} at δ = {self.target_delta:g} "
            f"({'closed form' if self.is_closed_form else self.accountant}; {budget})",
        ]
        if self.steps < self.steps_asked:
            lines.append(
                f"  Training stops after {self.steps} of {self.steps_asked} steps: then the budget is spent."
            )
        if math.isinf(self.epsilon):
            lines.append("  NO PRIVACY: no finite ε holds for this run.")
        if not self.noise_is_secure:
            lines.append("  INSECURE: the noise has a fixed seed; whoever knows it can remove the noise.")
        return "\n".join(lines)


def make_plan(
    arguments: PrivacyArguments, *, dataset_size: int, expected_batch_size: int, steps: int
) -> PrivacyPlan:
    """Works out all numbers of a run from what the user wrote.

    Args:
        arguments: The privacy settings; what they state wins over the values below.
        dataset_size: Number of units at hand.
        expected_batch_size: Expected units of a logical batch by the training arguments; not used for full batches.
        steps: Steps asked for.

    Raises:
        ConfigurationError: If the numbers contradict each other.
        PrivacyBudgetError: If the target cannot be reached, or not even one step fits the budget.
    """
    delta, target = arguments.target_delta, arguments.target_epsilon
    check_delta(delta, "PrivacyArguments.target_delta")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigurationError(f"Privacy plan: steps is {steps!r}. Ask for at least one optimizer step.")
    batch, mechanism = _resolve(arguments, dataset_size, expected_batch_size)
    mechanism = replace(mechanism, noise_multiplier=_noise_multiplier(arguments, mechanism, steps))
    allowed = steps if target is None else _steps_within(mechanism, arguments, steps)
    curve = EpsilonCurve(mechanism, horizon=allowed, accountant=arguments.accountant, cells=FINE_CELLS)
    plan = PrivacyPlan(
        privacy_unit=arguments.privacy_unit,
        user_column=arguments.user_column,
        samples_per_unit=arguments.samples_per_user or 1,
        dataset_size=mechanism.dataset_size,
        dataset_size_stated=arguments.dataset_size is not None,
        expected_batch_size=batch,
        sampling=mechanism.sampling,
        sampling_probability=mechanism.sampling_probability,
        batch_cap=mechanism.batch_cap,
        noise_multiplier=mechanism.noise_multiplier,
        neighbouring_relation=mechanism.neighbouring_relation,
        clipping=arguments.clipping_function(),
        target_epsilon=target,
        target_delta=delta,
        steps_asked=steps,
        steps=allowed,
        epsilon=curve.epsilon(allowed, delta),
        grid=curve.grid,
        accountant=arguments.accountant,
        noise_is_secure=arguments.insecure_noise_seed is None,
        noise_on_grid=arguments.secure_noise,
    )
    _warn(plan)
    return plan


def _resolve(arguments: PrivacyArguments, present: int, expected_batch_size: int) -> tuple[int, Mechanism]:
    """Settles B, N, q and the cap; the noise is still to come."""
    if isinstance(present, bool) or not isinstance(present, int) or present < 1:
        raise ConfigurationError(
            f"Privacy plan: the training set has {present!r} {arguments.privacy_unit}s. It needs at least one."
        )
    size = present if arguments.dataset_size is None else arguments.dataset_size
    if present > size:
        # More samples than accounted for would raise the chance that the cap acts, and with it ε.
        raise ConfigurationError(
            f"PrivacyArguments.dataset_size is {size}, but the training set has more "
            f"{arguments.privacy_unit}s. State a public upper bound, or leave it out to use the training set's number."
        )
    if arguments.sampling == "full_batch":
        if arguments.expected_batch_size not in (None, size):
            raise ConfigurationError(
                f"PrivacyArguments.expected_batch_size is {arguments.expected_batch_size}, but full batches have "
                f"{size} samples. Leave it out, or set sampling='poisson'."
            )
        batch = size
    else:
        batch = arguments.expected_batch_size or expected_batch_size
    try:
        return batch, mechanism_of(
            dataset_size=size,
            sampling=arguments.sampling,
            expected_batch_size=batch,
            noise_multiplier=0.0,
            batch_cap=arguments.batch_cap,
            neighbouring_relation=arguments.neighbouring_relation,
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"Privacy plan: {error}") from error


def _noise_multiplier(arguments: PrivacyArguments, mechanism: Mechanism, steps: int) -> float:
    if arguments.noise_multiplier is not None:
        return float(arguments.noise_multiplier)
    if arguments.target_epsilon is None:
        raise ConfigurationError("PrivacyArguments: set target_epsilon or noise_multiplier.")
    return calibrate_noise(
        mechanism,
        target_epsilon=arguments.target_epsilon,
        target_delta=arguments.target_delta,
        steps=steps,
        accountant=arguments.accountant,
    )


def _steps_within(mechanism: Mechanism, arguments: PrivacyArguments, steps: int) -> int:
    """Steps that fit the target ε, judged on the grid on which the plan reports it."""
    target, delta = arguments.target_epsilon, arguments.target_delta
    assert target is not None
    curve = EpsilonCurve(mechanism, horizon=steps, accountant=arguments.accountant, cells=FINE_CELLS)
    allowed = curve.steps_within(target_epsilon=target, target_delta=delta)
    # A shorter horizon has another grid, whose rounding may differ in the last digits.
    while allowed > 0 and (epsilon(mechanism, allowed, delta, accountant=arguments.accountant) > target):
        allowed -= 1
    if allowed == 0:
        raise PrivacyBudgetError(
            f"Not one step with noise_multiplier {mechanism.noise_multiplier:g} fits target_epsilon {target:g} at "
            f"δ = {delta:g}. Raise the noise or the target, or leave noise_multiplier out to have it calibrated."
        )
    return allowed


def _warn(plan: PrivacyPlan) -> None:
    if plan.target_delta * plan.dataset_size >= 1.0:
        warnings.warn(
            f"target_delta {plan.target_delta:g} is not below 1/N = {1.0 / plan.dataset_size:.3g}: it would allow to "
            f"publish a whole {plan.privacy_unit} now and then. Choose it well below.",
            PrivacyWarning,
            stacklevel=3,
        )
    if math.isinf(plan.epsilon):
        warnings.warn(
            f"noise_multiplier {plan.noise_multiplier:g} gives no privacy at all over {plan.steps} steps.",
            PrivacyWarning,
            stacklevel=3,
        )
