"""Privacy numbers of a run before it is run; loads no model.

python scripts/privacy.py epsilon    --dataset-size 67349 --expected-batch-size 1000 --epochs 3 --noise-multiplier 0.6 --delta 7e-6
python scripts/privacy.py noise      --dataset-size 67349 --expected-batch-size 1000 --epochs 3 --target-epsilon 8 --delta 7e-6
python scripts/privacy.py steps      --dataset-size 67349 --expected-batch-size 1000 --noise-multiplier 0.6 --target-epsilon 8 --delta 7e-6
python scripts/privacy.py batch-size --dataset-size 67349 --epochs 3 --noise-multiplier 0.6 --target-epsilon 8 --delta 7e-6
python scripts/privacy.py curve      --dataset-size 67349 --expected-batch-size 1000 --epochs 3 --noise-multiplier 0.6 --delta 7e-6 --over noise --write curve.png
python scripts/privacy.py what-if    --dataset-size 67349 --expected-batch-size 1000 --epochs 3 --noise-multiplier 0.6 --delta 7e-6
python scripts/privacy.py verify     runs/sentiment_quickstart/privacy_statement.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dp_trainer.errors import ConfigurationError, DPTrainerError
from dp_trainer.privacy.accounting import ACCOUNTANTS, EpsilonCurve, epsilon, rounded_up
from dp_trainer.privacy.allowance import LARGEST_STEPS, calibrate_batch_size, calibrate_steps, steps_in
from dp_trainer.privacy.attack import attack_rates
from dp_trainer.privacy.calibration import calibrate_noise
from dp_trainer.privacy.mechanism import NEIGHBOURING_RELATIONS, SAMPLINGS, Mechanism, mechanism_of
from dp_trainer.privacy.what_if import changed_runs

COMMANDS = {
    "epsilon": "ε of a given noise",
    "noise": "noise for a given ε",
    "steps": "the most steps within a given ε",
    "batch-size": "the largest logical batch within a given ε",
    "curve": "ε over steps, or against the noise",
    "what-if": "ε if one thing about a run were different",
}
POINTS = 25


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, computes, reports; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "curve":
            report = _curve(options)
        elif options.command == "what-if":
            report = _what_if(options)
        elif options.command == "verify":
            report = _verified(options.statement)
        else:
            report = _report(options)
    except DPTrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = {"curve": _curve_text, "what-if": _what_if_text, "verify": _verified_text}.get(
        options.command, _text
    )
    print(json.dumps(report, indent=2, allow_nan=False) if options.json else text(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        command.add_argument("--dataset-size", type=int, required=True, help="number of samples N")
        if name != "batch-size":
            command.add_argument(
                "--expected-batch-size", type=int, help="expected logical batch B; N for full batches"
            )
            command.add_argument("--batch-cap", type=int, help="largest logical batch; default B + 6√B")
        if name != "steps":
            duration = command.add_mutually_exclusive_group(required=True)
            duration.add_argument("--steps", type=int, help="optimizer steps")
            duration.add_argument("--epochs", type=float, help="passes over the data, each ceil(N / B) steps")
        command.add_argument("--delta", type=float, required=True, help="δ, well below 1 / N")
        command.add_argument("--sampling", choices=SAMPLINGS, default="poisson")
        command.add_argument(
            "--neighbouring-relation", choices=NEIGHBOURING_RELATIONS, default="add_or_remove_one"
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        if name != "noise":
            command.add_argument(
                "--noise-multiplier", type=float, required=True, help="noise std over sensitivity"
            )
        if name in ("noise", "steps", "batch-size"):
            command.add_argument("--target-epsilon", type=float, required=True, help="ε of the whole run")
        if name == "curve":
            command.add_argument("--over", choices=("steps", "noise"), default="steps")
            command.add_argument("--write", type=Path, help="draw it into this PNG")
    what = "whether a privacy statement's ε is that of what it describes"
    verify = commands.add_parser("verify", help=what, description=what, allow_abbrev=False)
    verify.add_argument("statement", type=Path, help="privacy_statement.json of a run")
    verify.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verified(path: Path) -> dict[str, Any]:
    # Here, since the clipping functions that it asks for their sensitivity load torch.
    from dp_trainer.privacy.verification import read_statement, verify_statement

    found = verify_statement(read_statement(path))
    return {
        "holds": True,
        "statement": str(path),
        "epsilon": {
            "stated": _finite(found.epsilon_stated),
            "recomputed": _finite(found.epsilon),
            "rdp": None if found.epsilon_rdp is None else _finite(found.epsilon_rdp),
        },
        "delta": found.delta,
        "steps": found.steps,
        "warnings": list(found.warnings),
    }


def _verified_text(report: dict[str, Any]) -> str:
    stated, recomputed, rdp = (_shown(report["epsilon"][name]) for name in ("stated", "recomputed", "rdp"))
    lines = [
        f"{report['statement']}: holds",
        f"ε after {report['steps']} steps at δ = {report['delta']:g}:",
        f"  stated      {stated}",
        f"  recomputed  {recomputed}",
        f"  RDP         {rdp}  (cross-check, looser; ∞ also where it knows no bound)",
        *(f"warning: {text}" for text in report["warnings"]),
        "A file alone cannot show that the run was made as it says, or that it belongs to given weights.",
    ]
    return "\n".join(lines)


def _run(options: argparse.Namespace) -> tuple[Mechanism, int, int]:
    """The run that was described: one step, its logical batch, and the steps (0 where they are asked for)."""
    size, batch = options.dataset_size, options.expected_batch_size
    if options.sampling == "full_batch" and batch is None:
        batch = size
    if batch is None:
        raise ConfigurationError("--expected-batch-size is missing. Give it, or --sampling full_batch.")
    mechanism = mechanism_of(
        dataset_size=size,
        sampling=options.sampling,
        expected_batch_size=batch,
        noise_multiplier=1.0 if options.command == "noise" else options.noise_multiplier,
        batch_cap=options.batch_cap,
        neighbouring_relation=options.neighbouring_relation,
    )
    if options.command == "steps":
        return mechanism, batch, 0
    steps = options.steps
    if steps is not None and steps < 1:
        raise ConfigurationError(f"--steps {steps} must be positive.")
    if options.epochs is not None:
        try:
            steps = steps_in(options.epochs, size, batch)
        except ConfigurationError as error:
            raise ConfigurationError(f"--{error}") from error
    return mechanism, batch, steps


def _report(options: argparse.Namespace) -> dict[str, Any]:
    target = {"target_delta": options.delta}
    if options.command != "epsilon":
        target["target_epsilon"] = options.target_epsilon
    if options.command == "batch-size":
        options.batch_cap = None
        options.expected_batch_size = calibrate_batch_size(
            noise_multiplier=options.noise_multiplier,
            dataset_size=options.dataset_size,
            steps=options.steps,
            epochs=options.epochs,
            sampling=options.sampling,
            neighbouring_relation=options.neighbouring_relation,
            **target,
        )
    mechanism, batch, steps = _run(options)
    if options.command == "steps":
        steps = calibrate_steps(mechanism, **target)
    if options.command == "noise":
        mechanism = replace(mechanism, noise_multiplier=calibrate_noise(mechanism, steps=steps, **target))
    return _numbers(mechanism, batch, steps, options.delta)


def _numbers(mechanism: Mechanism, batch: int, steps: int, delta: float) -> dict[str, Any]:
    accountants = {name: name for name in ACCOUNTANTS}
    if mechanism.is_unsampled:
        # The closed form is exact, and stands in for both numerical accountants.
        accountants = {"closed_form": "pld", "rdp": "rdp"}
    elif mechanism.replaces:
        accountants = {"pld": "pld"}
    values = {label: epsilon(mechanism, steps, delta, accountant=name) for label, name in accountants.items()}
    rates = attack_rates(mechanism, steps)
    return {
        "noise_multiplier": mechanism.noise_multiplier,
        "neighbouring_relation": mechanism.neighbouring_relation,
        "sampling": mechanism.sampling,
        "sampling_probability": batch / mechanism.dataset_size,
        "expected_batch_size": batch,
        "batch_cap": mechanism.batch_cap,
        "steps": steps,
        "delta": delta,
        "epsilon": {name: _finite(value) for name, value in values.items()},
        "true_positive_rate_bounds": {f"{rate:g}": bound for rate, bound in rates.items()},
    }


def _curve(options: argparse.Namespace) -> dict[str, Any]:
    mechanism, _, steps = _run(options)
    if options.over == "steps":
        curve = EpsilonCurve(mechanism, horizon=steps)
        places: list[float] = sorted({round(steps ** (k / (POINTS - 1))) for k in range(POINTS)})
        values = [curve.epsilon(round(place), options.delta) for place in places]
    else:
        places = [mechanism.noise_multiplier * 4.0 ** (2 * k / (POINTS - 1) - 1) for k in range(POINTS)]
        values = [
            EpsilonCurve(replace(mechanism, noise_multiplier=place), horizon=steps).epsilon(
                steps, options.delta
            )
            for place in places
        ]
    found = {
        "over": "steps" if options.over == "steps" else "noise multiplier",
        "delta": options.delta,
        "points": [[place, _finite(value)] for place, value in zip(places, values, strict=True)],
    }
    if options.write:
        _draw(found, options.write)
    return found


def _draw(found: dict[str, Any], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError(
            "--write: needs the package matplotlib. Install it (pip install 'dp_trainer[tasks]') or leave it out."
        )
    if not path.parent.is_dir():
        raise ConfigurationError(f"--write: there is no folder {path.parent}. Make it first.")
    # Loaded here: only a drawing needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    finite = [(place, value) for place, value in found["points"] if value is not None]
    axes.loglog([place for place, _ in finite], [value for _, value in finite], marker=".")
    axes.set_xlabel(found["over"])
    axes.set_ylabel(f"ε at δ = {found['delta']:g}")
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(path, format="png", dpi=150)


def _what_if(options: argparse.Namespace) -> dict[str, Any]:
    mechanism, batch, steps = _run(options)
    rows = changed_runs(mechanism, expected_batch_size=batch, steps=steps, delta=options.delta)
    return {
        "rows": [
            {
                "change": row.change,
                "sampling": row.mechanism.sampling,
                "expected_batch_size": row.expected_batch_size,
                "steps": row.steps,
                "noise_multiplier": row.mechanism.noise_multiplier,
                "delta": row.delta,
                "epsilon": _finite(row.epsilon),
            }
            for row in rows
        ]
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return rounded_up(math.inf if value is None else value)


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"noise multiplier  {report['noise_multiplier']:.5g}",
        f"sampling          {report['sampling']}, probability {report['sampling_probability']:.6g}, "
        f"at most {report['batch_cap']} samples",
        f"logical batch     {report['expected_batch_size']}",
        f"neighbours        {report['neighbouring_relation'].replace('_', ' ')}",
        f"steps             {report['steps']}"
        + (" (more were not looked at)" if report["steps"] == LARGEST_STEPS else ""),
        f"ε at δ = {report['delta']:g}:",
    ]
    roles = {"closed_form": "exact", "pld": "decides", "rdp": "cross-check, looser", "prv": "cross-check"}
    for name, value in report["epsilon"].items():
        lines.append(f"  {name.replace('_', ' ').upper()}  {_shown(value)}  ({roles[name]})")
    lines.append("best attack: right on used samples at most, if wrong on unused ones at most")
    for rate, bound in report["true_positive_rate_bounds"].items():
        lines.append(f"  {bound:7.2%}  {float(rate):.1%}")
    return "\n".join(lines)


def _curve_text(found: dict[str, Any]) -> str:
    lines = [f"{found['over']:>16}  ε at δ = {found['delta']:g}"]
    return "\n".join([*lines, *(f"{place:16.6g}  {_shown(value)}" for place, value in found["points"])])


def _what_if_text(found: dict[str, Any]) -> str:
    lines = [f"{'change':34} {'B':>9} {'steps':>9} {'noise':>8} {'δ':>8}  ε"]
    for row in found["rows"]:
        lines.append(
            f"{row['change']:34} {row['expected_batch_size']:9d} {row['steps']:9d} {row['noise_multiplier']:8.4g} "
            f"{row['delta']:8.2g}  {_shown(row['epsilon'])}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
