"""The privacy statement: what a run guarantees, for whom, and what it leaves open.

One JSON for machines, one page for people, one section for a model card. It
holds no secret and no number that was computed on the data, except what the
certificate measured, which stays out of the model card and of what is published.
``statement.schema.json`` says what each field is; ``verification`` works ε out again.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dp_trainer.privacy.accounting import EpsilonCurve, is_supported, rounded_up
from dp_trainer.privacy.attack import attack_rates
from dp_trainer.privacy.plan import PrivacyPlan

STATEMENT_VERSION = 2
UNITS = {
    "sample": "one sample: one row of the training set",
    "user": "one user: all rows of the training set that name the same user",
}
NEIGHBOURS = {
    "add_or_remove_one": "adding or removing one {}",
    "replace_one": "replacing one {} by another",
}
NEVER_COVERED = (
    "training losses, gradient norms, clip rates and dropped-sample counts in the logs",
    "evaluation on data that is itself private, and choosing a checkpoint or settings by it",
    "earlier runs on the same data, hyper-parameter searches among them: their ε adds up",
    "attacks on the generator, which is pseudo-random, and on how long its steps take",
    "whatever was learned about the data before training, such as a vocabulary or a length limit",
)
FLOATING_POINT = "attacks on the floating-point grid of the noise, against which secure_noise helps"
_PACKAGES = ("dp_trainer", "torch", "transformers", "dp-accounting", "numpy", "scipy")


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """What holds for the weights after ``steps`` releases of a plan.

    Guarantee: no number here is more favourable than what was proved; ε is rounded up.

    Args:
        plan: The run's plan.
        steps: Releases made.
        epsilon: ε after them by the plan's accountant.
        epsilon_rdp: The same by Rényi divergences, as a cross-check; None where they know no bound.
        grid: Grid of losses behind ``epsilon``; None where none was used.
        attack: False-positive rate → bound on the true-positive rate.
        certificate: What the certificate measured, or None if it did not run.
        generator: How the noise was made.
        versions: Package → version.
        other_computations: What else was computed on the data, outside the guarantee.
    """

    plan: PrivacyPlan
    steps: int
    epsilon: float
    epsilon_rdp: float | None
    grid: float | None
    attack: Mapping[float, float]
    certificate: Mapping[str, Any] | None
    generator: str
    versions: Mapping[str, str]
    other_computations: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must not overlook; empty for a sound run."""
        return statement_warnings(
            epsilon=self.epsilon,
            key_is_secret=self.plan.noise_is_secure,
            generator=self.generator,
            certified=self.certificate is not None,
            delta=self.plan.target_delta,
            dataset_size=self.plan.dataset_size,
        )

    @property
    def not_covered(self) -> tuple[str, ...]:
        """What the guarantee leaves out, in words."""
        grid = () if self.plan.noise_on_grid else (FLOATING_POINT,)
        return (*NEVER_COVERED, *grid, *self.other_computations)

    def published(self) -> PrivacyStatement:
        """The statement without what the certificate measured on samples; only that it ran, and on how many."""
        if self.certificate is None:
            return self
        said = {"samples": self.certificate.get("samples"), "measurements": "withheld"}
        return replace(self, certificate=said)

    @property
    def accounting(self) -> str:
        """How ``epsilon`` was worked out."""
        return "closed form" if self.plan.is_closed_form else self.plan.accountant.upper()

    def to_dict(self) -> dict[str, Any]:
        """The statement as plain data; what is infinite becomes None."""
        plan = self.plan
        return {
            "statement_version": STATEMENT_VERSION,
            "warnings": list(self.warnings),
            "epsilon": _finite(self.epsilon),
            "delta": plan.target_delta,
            "steps": self.steps,
            "unit": UNITS[plan.privacy_unit],
            "neighbouring_relation": NEIGHBOURS[plan.neighbouring_relation].format(plan.privacy_unit),
            "accountant": self.accounting,
            "grid": self.grid,
            "epsilon_rdp": None if self.epsilon_rdp is None else _finite(self.epsilon_rdp),
            "true_positive_rate_bounds": {f"{rate:g}": bound for rate, bound in self.attack.items()},
            "plan": plan.describe(),
            "noise_generator": self.generator,
            "certificate": None if self.certificate is None else dict(self.certificate),
            "not_covered": list(self.not_covered),
            "versions": dict(self.versions),
        }

    def to_json(self) -> str:
        """The statement as strict JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_prose(self) -> str:
        """One page of Markdown."""
        certificate = "It did not run."
        if self.certificate is not None:
            measured = ", ".join(f"{name} {_short(value)}" for name, value in self.certificate.items())
            certificate = f"Before the first step: {measured}."
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join(
            [
                "# Privacy statement",
                "",
                *self._warning_lines(),
                *self._guarantee_lines(),
                "",
                "## Certificate",
                "",
                certificate,
                "",
                *self._limits_lines(),
                "",
                f"Made with {versions}.",
            ]
        )

    def model_card_section(self) -> str:
        """A section for a model card; leaves out the certificate, whose figures come from the data."""
        return "\n".join(
            ["## Privacy", "", *self._warning_lines(), *self._guarantee_lines(), "", *self._limits_lines()]
        )

    def _warning_lines(self) -> list[str]:
        return [line for warning in self.warnings for line in (f"> **{warning}**", "")]

    def _guarantee_lines(self) -> list[str]:
        plan = self.plan
        clip = plan.clipping.describe()
        settings = ", ".join(f"{name} {value:g}" for name, value in clip.items() if isinstance(value, float))
        unit, named, most = plan.privacy_unit, "", ""
        public = "stated beforehand" if plan.dataset_size_stated else "counted, and taken as public"
        if unit == "user":
            named = f", named by column '{plan.user_column}'"
            most = f", with at most {plan.samples_per_unit} rows of each"
        grid = "" if self.grid is None else f", grid {self.grid:.2g}"
        draw = f"every {unit}, every step"
        if plan.sampling == "poisson":
            draw = (
                f"Poisson, each {unit} with probability {plan.sampling_probability:.6g} "
                f"(expected size {plan.expected_batch_size}, at most {plan.batch_cap})"
            )
        renyi = "no bound known for replaced samples under sampling"
        if self.epsilon_rdp is not None:
            renyi = f"{rounded_up(self.epsilon_rdp)} (cross-check, looser)"
        claim = (
            "The weights carry no differential-privacy guarantee."
            if math.isinf(self.epsilon)
            else f"The weights are ({rounded_up(self.epsilon)}, {plan.target_delta:g})-differentially private."
        )
        return [
            f"**{claim}**",
            "",
            "| | |",
            "| --- | --- |",
            f"| unit | {UNITS[unit]}{named} |",
            f"| neighbouring datasets | {NEIGHBOURS[plan.neighbouring_relation].format(unit)} |",
            f"| {unit}s | N = {plan.dataset_size} ({public}) |",
            f"| sampling | {draw}{most} |",
            f"| clipping | {clip['name']} ({settings}); sensitivity {plan.sensitivity:g} |",
            f"| noise multiplier | {plan.noise_multiplier:.6g}: std {plan.noise_std:.6g} on the clipped sum |",
            f"| releases | {self.steps} of {plan.steps} planned |",
            f"| ε at δ = {plan.target_delta:g} | {rounded_up(self.epsilon)} ({self.accounting}{grid}) |",
            f"| ε by Rényi divergences | {renyi} |",
            f"| noise generator | {self.generator} |",
            "",
            f"Somebody who sees every update and knows all other {unit}s, and tests whether one given {unit} "
            + ("or another was used:" if plan.mechanism.replaces else "was used:"),
            "",
            f"| wrong on unused {unit}s at most | right on used {unit}s at most |",
            "| --- | --- |",
            *(f"| {rate:.1%} | {_percent_up(bound)} |" for rate, bound in self.attack.items()),
        ]

    def _limits_lines(self) -> list[str]:
        return [
            "The guarantee covers the weights only. It does not cover:",
            "",
            *(f"- {item}" for item in self.not_covered),
        ]


def statement_warnings(
    *, epsilon: float, key_is_secret: bool, generator: str, certified: bool, delta: float, dataset_size: int
) -> tuple[str, ...]:
    """Returns what a reader must not overlook, given what a statement says."""
    found = []
    if math.isinf(epsilon):
        found.append("NO PRIVACY: no finite ε holds for this run.")
    if not key_is_secret or "insecure" in generator.lower():
        found.append(
            "INSECURE NOISE: the noise came from a fixed seed. Whoever knows or guesses it can remove the noise; "
            "the guarantee does not hold against them."
        )
    if not certified:
        found.append(
            "NO CERTIFICATE: per-sample gradients were not compared with plain autograd, so that each sample's "
            "contribution is bounded was not checked on this model."
        )
    if delta * dataset_size >= 1.0:
        found.append(
            "LARGE δ: δ is not below 1/N, which would allow to publish all of one unit now and then."
        )
    return tuple(found)


def privacy_statement(
    plan: PrivacyPlan,
    *,
    steps: int,
    certificate: Mapping[str, Any] | None,
    generator: str,
    versions: Mapping[str, str] | None = None,
    other_computations: Sequence[str] = (),
) -> PrivacyStatement:
    """Works out the statement for the weights after ``steps`` releases of a plan.

    Args:
        plan: The run's plan.
        steps: Releases made so far, at most ``plan.steps``.
        certificate: ``Certificate.describe()``, or None if it did not run.
        generator: ``NoiseGenerator.describe()``.
        versions: Package → version; looked up if not given.
        other_computations: What else was computed on the data, in words.

    Raises:
        ConfigurationError: If ``steps`` is not in [0, ``plan.steps``].
    """
    mechanism, renyi = plan.mechanism, None
    if is_supported(mechanism, "rdp"):
        curve = EpsilonCurve(mechanism, horizon=plan.steps, accountant="rdp")
        renyi = curve.epsilon(steps, plan.target_delta)
    return PrivacyStatement(
        plan=plan,
        steps=steps,
        epsilon=plan.epsilon_after(steps),
        epsilon_rdp=renyi,
        grid=plan.grid_after(steps),
        attack=attack_rates(mechanism, steps),
        certificate=certificate,
        generator=generator,
        versions=installed_versions() if versions is None else versions,
        other_computations=tuple(other_computations),
    )


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the guarantee rests on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _percent_up(bound: float) -> str:
    return f"{math.ceil(bound * 1000.0) / 10.0:.1f}%"
