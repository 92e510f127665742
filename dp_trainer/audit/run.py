"""Runs the layers of an audit and draws the verdict."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from dp_trainer.audit.arguments import AuditArguments
from dp_trainer.audit.contributions import audited_samples, check_contributions, real_samples
from dp_trainer.audit.draws import check_draws
from dp_trainer.audit.findings import AttackPoint, EpsilonBound, Finding
from dp_trainer.audit.noise import check_noise
from dp_trainer.audit.one_run import MOST_STEPS, attack_one_run
from dp_trainer.audit.step import AttackResult, attack_step
from dp_trainer.errors import ConfigurationError
from dp_trainer.trainer import DPTrainer


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """All that an audit measured.

    Guarantee: ``contradictions`` of a correct run is empty but with the probability
    ``arguments.audit_false_alarm``; that it is empty proves nothing.

    Args:
        plan: The audited run's numbers.
        arguments: The audit's own settings.
        findings: Measurements against claims.
        attacks: Layer → what its attack reached.
    """

    plan: dict[str, Any]
    arguments: AuditArguments
    findings: list[Finding]
    attacks: dict[str, AttackResult]

    @property
    def points(self) -> list[AttackPoint]:
        """All rates of all attacks."""
        return [point for attack in self.attacks.values() for point in attack.points]

    @property
    def bounds(self) -> list[EpsilonBound]:
        """All lower bounds on ε."""
        return [bound for attack in self.attacks.values() for bound in attack.bounds]

    @property
    def contradictions(self) -> list[str]:
        """Every disagreement, in words."""
        found = [
            f"{f.layer}: {f.name}: {f.measured}; claimed: {f.claimed}" for f in self.findings if not f.agrees
        ]
        for layer, attack in self.attacks.items():
            above = [point for point in attack.points if not point.agrees]
            found += [f"{layer}: {_in_words(point)}" for point in _worst(above)]
            found += [
                f"{b.layer}: ε is at least {b.at_confidence_of_verdict:.3f}, by {b.method}; claimed: at most {b.claimed:.3f} "
                f"at δ = {b.delta:g}"
                for b in attack.bounds
                if not b.agrees
            ]
        return found

    @property
    def layers_that_disagree(self) -> set[str]:
        """Which layers found a contradiction."""
        return {line.partition(":")[0] for line in self.contradictions}

    @property
    def verdict(self) -> str:
        """One line."""
        claim = self.plan["epsilon"]
        if self.contradictions:
            return f"CONTRADICTION: {self.contradictions[0]}"
        stated = "∞" if claim is None else f"{math.ceil(claim * 1e3) / 1e3:.3f}"
        return f"no contradiction found at ε = {stated}, δ = {self.plan['target_delta']:g}"

    def describe(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "verdict": self.verdict,
            "contradictions": self.contradictions,
            "plan": self.plan,
            "arguments": dataclasses.asdict(self.arguments),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "points": [{**dataclasses.asdict(point), "agrees": point.agrees} for point in self.points],
            "epsilon_bounds": [
                {**dataclasses.asdict(bound), "agrees": bound.agrees} for bound in self.bounds
            ],
        }


def audit(trainer: DPTrainer, arguments: AuditArguments, *, quiet: bool = False) -> AuditReport:
    """Audits the run that a trainer is set up for; the trainer and its model stay as they are.

    Args:
        trainer: Ready to train. What matters is its plan, model, loss, collator and arguments.
        arguments: How hard to try.
        quiet: No progress bars.

    Raises:
        ConfigurationError: If the run has no noise, or too few samples for the canaries asked for.
    """
    plan = trainer.plan
    if plan.noise_multiplier == 0.0:
        raise ConfigurationError(
            "audit: noise_multiplier is 0, so the run claims no privacy and there is nothing to refute. "
            "Set target_epsilon, or a noise_multiplier above 0."
        )
    if (plan.privacy_unit, plan.neighbouring_relation) != ("sample", "add_or_remove_one"):
        raise ConfigurationError(
            f"audit: the run protects one {plan.privacy_unit}, neighbours by {plan.neighbouring_relation}; canaries are "
            "single samples that are added or left out. Audit the same run with privacy_unit='sample' and "
            "neighbouring_relation='add_or_remove_one', which share all its code but the draw of users."
        )
    # Statistical parts share the false alarms: noise, draws, and each attack.
    failure = arguments.audit_false_alarm / 4
    findings: list[Finding] = []
    attacks: dict[str, AttackResult] = {}
    layers = arguments.audit_layers
    real = real_samples(trainer, arguments.audit_samples)
    if "exact" in layers:
        samples = audited_samples(trainer, arguments.audit_samples)
        findings += [_key(trainer), *check_contributions(trainer, samples)]
        findings += check_noise(
            trainer, samples, entries=arguments.audit_noise_entries, failure=failure, quiet=quiet
        )
        findings += check_draws(trainer, draws=arguments.audit_draws, failure=failure, quiet=quiet)
    if "step" in layers:
        attacks["step"] = attack_step(
            trainer,
            base=real[0],
            releases=arguments.audit_releases,
            canaries=arguments.audit_step_canaries,
            failure=failure,
            quiet=quiet,
        )
    if "one_run" in layers:
        attacks["one_run"] = attack_one_run(
            trainer,
            samples=real,
            canaries=_canaries(arguments, plan.dataset_size, len(real)),
            steps=arguments.audit_steps or min(plan.steps, MOST_STEPS),
            failure=failure,
            quiet=quiet,
        )
    findings += [finding for attack in attacks.values() for finding in attack.findings]
    return AuditReport(plan=plan.describe(), arguments=arguments, findings=findings, attacks=attacks)


def _canaries(arguments: AuditArguments, dataset_size: int, real: int) -> int:
    if arguments.audit_canaries + real > dataset_size:
        raise ConfigurationError(
            f"audit: {arguments.audit_canaries} canaries and {real} real samples do not fit the run's {dataset_size} "
            f"samples. Set audit_canaries to at most {dataset_size - real}, or leave the layer one_run out."
        )
    return arguments.audit_canaries


def _key(trainer: DPTrainer) -> Finding:
    return Finding(
        layer="exact",
        name="noise key",
        agrees=trainer.plan.noise_is_secure,
        measured="drawn from the operating system" if trainer.plan.noise_is_secure else "fixed by a setting",
        claimed="secret",
    )


def _worst(above: list[AttackPoint]) -> list[AttackPoint]:
    return sorted(above, key=lambda p: p.allowed_true_positive_rate - p.smallest_true_positive_rate)[:1]


def _in_words(point: AttackPoint) -> str:
    return (
        f"{point.setting}: found {point.true_positives} of {point.ins} canaries with {point.false_positives} false "
        f"alarms in {point.outs}: at a false-positive rate of at most {point.largest_false_positive_rate:.3f} a "
        f"true-positive rate of at least {point.smallest_true_positive_rate:.3f}; "
        f"claimed: at most {point.allowed_true_positive_rate:.3f}"
    )
