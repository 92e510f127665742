"""The count of what a run has spent, and its record in a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dp_trainer.errors import ConfigurationError, PrivacyBudgetError
from dp_trainer.privacy.accounting import rounded_up

if TYPE_CHECKING:
    from dp_trainer.privacy.plan import PrivacyPlan

RECORD_VERSION = 1
# What records of earlier versions leave out, since there was no choice then.
_ONCE_THE_ONLY_CHOICE = {
    "privacy_unit": "sample",
    "user_column": None,
    "samples_per_unit": 1,
    "neighbouring_relation": "add_or_remove_one",
}


class PrivacyAccountant:
    """Counts the steps of a plan and refuses the one that would exceed it.

    Guarantee: ``steps_spent`` never falls behind the steps allowed by ``spend_step``,
    and never exceeds ``plan.steps``. Its record holds no generator state.

    Args:
        plan: The plan whose steps are counted.
    """

    def __init__(self, plan: PrivacyPlan) -> None:
        self.plan = plan
        self._steps_spent = 0

    @property
    def steps_spent(self) -> int:
        """Releases made so far."""
        return self._steps_spent

    @property
    def epsilon(self) -> float:
        """ε spent so far, an upper bound at the plan's δ."""
        return self.plan.epsilon_after(self._steps_spent)

    def spend_step(self) -> None:
        """Counts one more release; call it before the release takes effect.

        Raises:
            PrivacyBudgetError: If the plan has no step left; the count is unchanged.
        """
        if self._steps_spent >= self.plan.steps:
            raise PrivacyBudgetError(
                f"All {self.plan.steps} steps of the privacy plan are spent (ε = {rounded_up(self.plan.epsilon)} at "
                f"δ = {self.plan.target_delta:g}). Stop here, or plan more steps from the start with more noise."
            )
        self._steps_spent += 1

    @property
    def epsilon_in_logs(self) -> float:
        """ε to four decimals, never less than was spent."""
        return math.ceil(self.epsilon * 1e4) / 1e4 if math.isfinite(self.epsilon) else self.epsilon

    def state_dict(self) -> dict[str, Any]:
        """The record for a checkpoint, ready for JSON."""
        record = {"version": RECORD_VERSION, "steps_spent": self._steps_spent, "plan": self.plan.identity()}
        return {**record, "checksum": _checksum(record)}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Takes over the count of a checkpoint; on any error the count is unchanged.

        Args:
            state: What ``state_dict`` returned, maybe read back from JSON; None if there was none.

        Raises:
            ConfigurationError: If the record is missing, damaged, of another version or of another plan, or
                counts fewer steps than were counted here.
            PrivacyBudgetError: If it has spent more steps than this plan allows.
        """
        steps_spent = _checked_record(state, self.plan)
        if steps_spent > self.plan.steps:
            raise PrivacyBudgetError(
                f"The checkpoint has spent {steps_spent} steps, this plan allows {self.plan.steps}. "
                "Raise target_epsilon together with a stated noise_multiplier, or use the weights as they are."
            )
        if steps_spent < self._steps_spent:
            raise ConfigurationError(
                f"This accountant has counted {self._steps_spent} steps, the checkpoint {steps_spent}: the steps "
                "between them were released too, and would go uncounted. Resume from the latest checkpoint, or "
                "with a new DPTrainer, whose ε then adds to this one."
            )
        self._steps_spent = steps_spent


def _checksum(record: Mapping[str, Any]) -> str:
    """Finds damage, not forgery."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _checked_record(state: Mapping[str, Any] | None, plan: PrivacyPlan) -> int:
    if not state:
        raise ConfigurationError(
            "The checkpoint has no privacy record, so nobody knows what it has spent. "
            "Resume from one that this trainer saved, or start anew from public weights."
        )
    record = {name: value for name, value in state.items() if name != "checksum"}
    if state.get("checksum") != _checksum(record):
        raise ConfigurationError(
            "The checkpoint's privacy record is damaged: its checksum does not match. Resume from an earlier one."
        )
    if record.get("version") != RECORD_VERSION:
        raise ConfigurationError(
            f"The checkpoint's privacy record has version {record.get('version')!r}, this package reads "
            f"{RECORD_VERSION}. Resume with the version that wrote it."
        )
    then, now = {**_ONCE_THE_ONLY_CHOICE, **record["plan"]}, plan.identity()
    changed = [name for name in sorted({*then, *now}) if not _same(then.get(name), now.get(name))]
    if changed:
        differences = "; ".join(f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in changed)
        raise ConfigurationError(
            f"The checkpoint was trained under another privacy plan: {differences}. Restore the settings (a "
            "calibrated noise_multiplier depends on the steps asked for: state it), or start a new run."
        )
    return int(record["steps_spent"])


def _same(then: object, now: object) -> bool:
    # Another processor may round a calibrated value differently in its last digits.
    if isinstance(then, float) and isinstance(now, float):
        return math.isclose(then, now, rel_tol=1e-9)
    return then == now
