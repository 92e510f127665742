"""What an audit found, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One comparison of something measured with something claimed.

    Args:
        layer: ``"exact"``, ``"step"`` or ``"one_run"``.
        name: What was compared.
        agrees: Whether the measurement is compatible with the claim.
        measured: The measurement, in words with its number.
        claimed: What the run claims.
    """

    layer: str
    name: str
    agrees: bool
    measured: str
    claimed: str


@dataclass(frozen=True, kw_only=True)
class AttackPoint:
    """How often one rule "it was in" was right and wrong, beside what the claim allows.

    Args:
        setting: Which attack.
        false_positives: Wrong "in" answers.
        outs: Trials without the canary.
        true_positives: Right "in" answers.
        ins: Trials with the canary.
        largest_false_positive_rate: Upper confidence bound.
        smallest_true_positive_rate: Lower confidence bound.
        allowed_true_positive_rate: The claim's bound at ``largest_false_positive_rate``.
    """

    setting: str
    false_positives: int
    outs: int
    true_positives: int
    ins: int
    largest_false_positive_rate: float
    smallest_true_positive_rate: float
    allowed_true_positive_rate: float

    @property
    def agrees(self) -> bool:
        """Whether even the cautious reading stays under the claimed trade-off curve."""
        # A confidence bound of 1 on the rate of false alarms says nothing; then both sides are 1.
        return self.smallest_true_positive_rate <= self.allowed_true_positive_rate + 1e-9


@dataclass(frozen=True, kw_only=True)
class EpsilonBound:
    """An empirical lower bound on ε beside the claimed upper bound.

    Args:
        layer: Which attack it comes from.
        method: How it was derived.
        confidence: Chance that a run with a smaller ε would not have given this bound, e.g. 0.95.
        at_least: The lower bound.
        at_confidence_of_verdict: The same at the stricter confidence by which a contradiction is called.
        claimed: The claimed ε.
        delta: The δ of both.
    """

    layer: str
    method: str
    confidence: float
    at_least: float
    at_confidence_of_verdict: float
    claimed: float
    delta: float

    @property
    def agrees(self) -> bool:
        """Whether the claim survives."""
        return self.at_confidence_of_verdict <= self.claimed
