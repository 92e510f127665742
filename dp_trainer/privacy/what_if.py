"""What ε would be if one thing about a run were different."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dp_trainer.privacy.accounting import COARSE_CELLS, EpsilonCurve, most_steps
from dp_trainer.privacy.mechanism import SMALLEST_DELTA, Mechanism, mechanism_of, steps_of_one_pass


@dataclass(frozen=True, kw_only=True)
class ChangedRun:
    """One row of the table: a run, and its ε, an upper bound.

    Args:
        change: What is different, in words.
        mechanism: One step.
        expected_batch_size: B.
        steps: Steps.
        delta: δ.
        epsilon: ε of the run.
    """

    change: str
    mechanism: Mechanism
    expected_batch_size: int
    steps: int
    delta: float
    epsilon: float


def changed_runs(
    mechanism: Mechanism, *, expected_batch_size: int, steps: int, delta: float
) -> list[ChangedRun]:
    """Returns the run as it is, and with one thing changed at a time; changes that make no sense are left out.

    Args:
        mechanism: One step of the run.
        expected_batch_size: B.
        steps: Steps of the run.
        delta: δ.

    Raises:
        ConfigurationError: If the run's numbers are out of range.
    """
    batch, noise = expected_batch_size, mechanism.noise_multiplier
    changes: list[tuple[str, dict[str, float | int | str]]] = [
        ("as it is", {}),
        ("half the noise", {"noise_multiplier": noise / 2}),
        ("twice the noise", {"noise_multiplier": noise * 2}),
        ("half the steps", {"steps": max(1, steps // 2)}),
        ("twice the steps", {"steps": steps * 2}),
        ("half the batch", {"batch": batch // 2}),
        ("twice the batch", {"batch": batch * 2}),
        ("half the batch, as many samples", {"batch": batch // 2, "steps": steps * 2}),
        ("twice the batch, as many samples", {"batch": batch * 2, "steps": max(1, steps // 2)}),
        ("a tenth of δ", {"delta": delta / 10}),
        ("replaced samples", {"relation": "replace_one"}),
        ("added or removed samples", {"relation": "add_or_remove_one"}),
        ("shuffled batches, replaced samples", {"sampling": "shuffle", "relation": "replace_one"}),
        ("Poisson sampling", {"sampling": "poisson"}),
        ("every sample, every step", {"sampling": "full_batch", "batch": mechanism.dataset_size}),
    ]
    base: dict[str, float | int | str] = {
        "noise_multiplier": noise,
        "steps": steps,
        "batch": batch,
        "delta": delta,
        "relation": mechanism.neighbouring_relation,
        "sampling": mechanism.sampling,
    }
    return list(_rows(mechanism, base, changes))


def _rows(
    mechanism: Mechanism,
    base: dict[str, float | int | str],
    changes: list[tuple[str, dict[str, float | int | str]]],
) -> Iterator[ChangedRun]:
    for words, change in changes:
        run = {**base, **change}
        if (change and run == base) or not _makes_sense(mechanism, run):
            continue
        batch, steps, delta = int(run["batch"]), int(run["steps"]), float(run["delta"])
        kept_cap = (
            run["sampling"] == "poisson" and run["batch"] == base["batch"] and mechanism.sampling == "poisson"
        )
        changed = mechanism_of(
            dataset_size=mechanism.dataset_size,
            sampling=str(run["sampling"]),
            expected_batch_size=batch,
            noise_multiplier=float(run["noise_multiplier"]),
            batch_cap=mechanism.batch_cap if kept_cap else None,
            neighbouring_relation=str(run["relation"]),
        )
        curve = EpsilonCurve(changed, horizon=steps, cells=COARSE_CELLS)
        yield ChangedRun(
            change=words,
            mechanism=changed,
            expected_batch_size=batch,
            steps=steps,
            delta=delta,
            epsilon=curve.epsilon(steps, delta),
        )


def _makes_sense(mechanism: Mechanism, run: dict[str, float | int | str]) -> bool:
    batch, size = int(run["batch"]), mechanism.dataset_size
    if not 1 <= batch <= size or float(run["delta"]) < SMALLEST_DELTA:
        return False
    if int(run["steps"]) > most_steps(float(run["delta"])):
        return False
    if run["sampling"] == "shuffle" and steps_of_one_pass(size, batch) == 1:
        return False
    if run["sampling"] == "shuffle" and run["relation"] != "replace_one":
        return False
    return (batch == size) == (run["sampling"] == "full_batch") or run[
        "sampling"
    ] == mechanism.sampling == "poisson"
