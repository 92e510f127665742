"""Holds a privacy statement against itself: is the ε it claims the ε of what it describes?

Guarantee: ``verify_statement`` returns only if the file has every field of its format
and no other, no number contradicts another, and every ε and attack bound in it is at least what
is worked out here anew from the mechanism it names.

**What a file alone cannot show.** That the run happened as described: that this many
releases were made and not more, that noise was added and each sample clipped, that N is true,
that the key was secret, that the column it names tells one user from another, or that the file belongs to
the weights beside it. Somebody who lowers the
steps and every number that follows from them writes a statement of another run, and a correct one. Against
that help the run's checkpoints (``privacy_record.json`` and ``trainer_state.json`` count the
steps too), its configuration and logs, and a signature of whoever ran it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.accounting import FINE_CELLS, EpsilonCurve, is_supported
from dp_trainer.privacy.attack import attack_rates
from dp_trainer.privacy.clipping import CLIPPING_FUNCTIONS, ClippingFunction
from dp_trainer.privacy.loss_distribution import rounding_allowance
from dp_trainer.privacy.mechanism import Mechanism
from dp_trainer.privacy.schema import schema_faults
from dp_trainer.privacy.statement import (
    FLOATING_POINT,
    NEIGHBOURS,
    NEVER_COVERED,
    STATEMENT_VERSION,
    UNITS,
    statement_warnings,
)

# Other processors and libraries round the last digits differently.
_ROUNDING = 1e-6
# So much above what is due, an ε belongs to another mechanism or number of steps.
_EXCESS = 0.02


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was worked out anew from a statement that holds.

    Args:
        epsilon_stated: ε as the file says; infinite where it claims none.
        epsilon: ε as worked out here, at most the stated one but for rounding.
        epsilon_rdp: The same by Rényi divergences; None where they know no bound.
        delta: δ.
        steps: Releases.
        warnings: What the file itself warns of.
    """

    epsilon_stated: float
    epsilon: float
    epsilon_rdp: float | None
    delta: float
    steps: int
    warnings: tuple[str, ...]


def statement_schema() -> dict[str, Any]:
    """Returns the JSON schema of statements, as shipped."""
    text = resources.files("dp_trainer.privacy").joinpath("statement.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def read_statement(path: Path) -> dict[str, Any]:
    """Reads a statement's file.

    Raises:
        ConfigurationError: If it is no JSON object, names a field twice, or holds a number that JSON has not.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigurationError(
            f"{path}: cannot be read as JSON ({error}). Give privacy_statement.json."
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: holds no JSON object. Give privacy_statement.json.")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # One reader would take the first of two values, another the last.
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"{', '.join(twice)}: stands twice in the file. A statement says each thing once."
        )
    return dict(pairs)


def _no_constant(word: str) -> float:
    raise ConfigurationError(f"{word}: is no number in JSON. An infinite ε is written as null.")


def verify_statement(content: Mapping[str, Any]) -> Verified:
    """Returns what a statement's own numbers imply, if they bear it out.

    Args:
        content: The statement, as ``read_statement`` returns it.

    Raises:
        ConfigurationError: Naming each field that is missing, unknown, contradicts another, or promises
            more privacy than the mechanism described gives.
    """
    version = content.get("statement_version")
    if version != STATEMENT_VERSION or isinstance(version, bool):
        raise ConfigurationError(
            f"statement_version: is {version!r}, this package reads {STATEMENT_VERSION}. Verify with the version of "
            "dp_trainer that wrote the file."
        )
    _refuse(schema_faults(content, statement_schema()))
    clipping = _clipping(content["plan"])
    _refuse(_contradictions(content, clipping))
    return _recomputed(content)


def _refuse(faults: list[str]) -> None:
    if faults:
        lines = "".join(f"\n  {fault}." for fault in faults)
        raise ConfigurationError(
            f"The privacy statement does not hold:{lines}\nAsk whoever ran the training for the file as it was written."
        )


def _clipping(plan: Mapping[str, Any]) -> ClippingFunction:
    settings = {name: value for name, value in plan["clipping"].items() if name != "name"}
    kind = CLIPPING_FUNCTIONS[plan["clipping"]["name"]]
    fields = {*kind.__dataclass_fields__}  # type: ignore[attr-defined]
    faults = [
        f"plan.clipping.{name}: is no setting of {kind.__name__}" for name in sorted(settings.keys() - fields)
    ]
    faults += [f"plan.clipping.{name}: is missing" for name in sorted(fields - settings.keys())]
    _refuse(faults)
    return kind(**settings)


def _contradictions(content: Mapping[str, Any], clipping: ClippingFunction) -> list[str]:
    """What one part of a statement says against another."""
    plan = content["plan"]
    full = plan["sampling"] == "full_batch"
    size, batch, noise = plan["dataset_size"], plan["expected_batch_size"], plan["noise_multiplier"]
    unit, rows = plan["privacy_unit"], plan["samples_per_unit"]
    sensitivity = rows * clipping.sensitivity
    due = {
        "plan.sensitivity": (plan["sensitivity"], sensitivity, "what clipping bounds × plan.samples_per_unit"),
        "plan.noise_std": (plan["noise_std"], noise * sensitivity, "plan.noise_multiplier × plan.sensitivity"),
        "plan.sampling_probability": (
            plan["sampling_probability"], batch / size, "plan.expected_batch_size / plan.dataset_size"
        ),
        "plan.target_delta": (plan["target_delta"], content["delta"], "delta"),
    }  # fmt: skip
    found = [
        f"{name}: is {stated!r}, but {what} is {right!r}"
        for name, (stated, right, what) in due.items()
        if not math.isclose(stated, right, rel_tol=1e-9)
    ]
    rules = [
        (content["unit"] != UNITS[unit], "unit: plan.privacy_unit says otherwise"),
        (
            content["neighbouring_relation"] != NEIGHBOURS[plan["neighbouring_relation"]].format(unit),
            "neighbouring_relation: plan.neighbouring_relation and plan.privacy_unit say otherwise",
        ),
        (unit == "sample" and rows != 1, "plan.samples_per_unit: a sample is one row"),
        (
            (unit == "user") is (plan["user_column"] is None),
            "plan.user_column: names users, and plan.privacy_unit says otherwise",
        ),
        (full and plan["batch_cap"] != size, "plan.batch_cap: full batches have every sample"),
        (full and batch != size, "plan.expected_batch_size: full batches have every sample"),
        (plan["batch_cap"] < batch, "plan.batch_cap: is below plan.expected_batch_size"),
        (content["steps"] > plan["steps"], "steps: more than plan.steps, the releases that were planned"),
        (plan["steps"] > plan["steps_asked"], "plan.steps: more than plan.steps_asked"),
        (
            plan["steps"] < plan["steps_asked"] and plan["target_epsilon"] is None,
            "plan.steps: fewer than plan.steps_asked, which only a target_epsilon may cause",
        ),
        (
            plan["target_epsilon"] is not None and _number(plan["epsilon"]) > plan["target_epsilon"],
            "plan.epsilon: above plan.target_epsilon",
        ),
        (
            plan["noise_on_grid"] is not ("common grid" in content["noise_generator"])
            and "insecure" not in content["noise_generator"].lower(),
            "plan.noise_on_grid: noise_generator says otherwise",
        ),
    ]
    return [*found, *(text for broken, text in rules if broken), *_words_left_out(content)]


def _words_left_out(content: Mapping[str, Any]) -> list[str]:
    """Warnings and limits that such a run must state."""
    plan = content["plan"]
    warned = statement_warnings(
        epsilon=_number(content["epsilon"]),
        key_is_secret=plan["noise_is_secure"],
        generator=content["noise_generator"],
        certified=content["certificate"] is not None,
        delta=content["delta"],
        dataset_size=plan["dataset_size"],
    )
    limits = [*NEVER_COVERED, *([] if plan["noise_on_grid"] else [FLOATING_POINT])]
    return [
        *(f"warnings: lacks '{text}'" for text in warned if text not in content["warnings"]),
        *(f"not_covered: lacks '{text}'" for text in limits if text not in content["not_covered"]),
    ]


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _recomputed(content: Mapping[str, Any]) -> Verified:
    """Works out every privacy number again and holds it against the stated one."""
    plan, steps, delta = content["plan"], content["steps"], content["delta"]
    mechanism = Mechanism(
        dataset_size=plan["dataset_size"],
        sampling=plan["sampling"],
        sampling_probability=plan["sampling_probability"],
        batch_cap=plan["batch_cap"],
        noise_multiplier=float(plan["noise_multiplier"]),
        neighbouring_relation=plan["neighbouring_relation"],
    )
    name = plan["accountant"]
    # Where this processor must allow more for its own rounding than another one did, that is no fault of the file.
    delta += rounding_allowance(plan["steps"]) - rounding_allowance(plan["steps"], extended=True)
    curve = EpsilonCurve(mechanism, horizon=plan["steps"], accountant=name, cells=FINE_CELLS)
    planned = curve.epsilon(plan["steps"], delta)
    claimed, bound = planned, planned
    if steps < plan["steps"]:
        # On the coarser grid of log lines, as a run works it out that stopped early. All of these are upper bounds.
        logged = EpsilonCurve(mechanism, horizon=plan["steps"], accountant=name).epsilon(steps, delta)
        claimed = min(planned, logged)
        bound = min(claimed, curve.epsilon(steps, delta))
    renyi = None
    if is_supported(mechanism, "rdp"):
        renyi = EpsilonCurve(mechanism, horizon=plan["steps"], accountant="rdp").epsilon(steps, delta)
    rates = attack_rates(mechanism, steps)
    said = "closed form" if curve.is_closed_form else name.upper()
    faults = [
        *_wrong_bound("epsilon", content["epsilon"], bound, claimed, steps),
        *_wrong_bound("plan.epsilon", plan["epsilon"], planned, planned, plan["steps"]),
        *_wrong_cross_check(content["epsilon_rdp"], renyi, steps),
        *(
            fault
            for rate, value in rates.items()
            for fault in _wrong_bound(
                f"true_positive_rate_bounds.{rate:g}",
                content["true_positive_rate_bounds"][f"{rate:g}"],
                value,
                value,
                steps,
            )
        ),
    ]
    if content["accountant"] != said:
        faults.append(f"accountant: is {content['accountant']!r}, but the plan's is {said!r}")
    for place, grid in (("grid", content["grid"]), ("plan.grid", plan["grid"])):
        if (grid is None) is not (curve.grid is None):
            faults.append(f"{place}: is {grid!r}, but {said} uses {'none' if curve.grid is None else 'one'}")
    _refuse(faults)
    return Verified(
        epsilon_stated=_number(content["epsilon"]),
        epsilon=bound,
        epsilon_rdp=renyi,
        delta=content["delta"],
        steps=steps,
        warnings=tuple(content["warnings"]),
    )


def _wrong_cross_check(stated: float | None, renyi: float | None, steps: int) -> list[str]:
    if renyi is not None:
        return _wrong_bound("epsilon_rdp", stated, renyi, renyi, steps)
    return (
        [] if stated is None else [f"epsilon_rdp: is {stated:.6g}, but no bound is known for this mechanism"]
    )


def _wrong_bound(name: str, stated: float | None, least: float, claimed: float, steps: int) -> list[str]:
    """A bound that promises too much; or so little that another mechanism or number of steps must be meant."""
    value = _number(stated)
    if value < least * (1.0 - _ROUNDING) - 1e-9:
        return [f"{name}: is {value:.6g}, too small: {steps} releases of this mechanism give {least:.6g}"]
    if math.isfinite(claimed) and not value <= claimed * (1.0 + _EXCESS) + 1e-3:
        return [
            f"{name}: is {value:.6g}, but {steps} releases of this mechanism give {claimed:.6g}: steps or noise were "
            "altered"
        ]
    return []
