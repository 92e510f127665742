"""Privacy numbers of a run before it is run; loads no model.

python scripts/privacy.py epsilon --dataset-size 67349 --expected-batch-size 1000 --epochs 3 --noise-multiplier 0.6 --delta 7e-6
python scripts/privacy.py noise --dataset-size 67349 --expected-batch-size 1000 --epochs 3 --target-epsilon 8 --delta 7e-6
python scripts/privacy.py verify runs/sentiment_quickstart/privacy_statement.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_trainer.errors import ConfigurationError, DPTrainerError
from dp_trainer.privacy.accounting import (
    ACCOUNTANTS,
    SAMPLINGS,
    Mechanism,
    default_batch_cap,
    epsilon,
    rounded_up,
)
from dp_trainer.privacy.attack import attack_rates
from dp_trainer.privacy.calibration import calibrate_noise


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, computes, reports; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        report = _verified(options.statement) if options.command == "verify" else _report(options)
    except DPTrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = _verified_text if options.command == "verify" else _text
    print(json.dumps(report, indent=2, allow_nan=False) if options.json else text(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("epsilon", "ε of a given noise"), ("noise", "noise for a given ε")):
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        command.add_argument("--dataset-size", type=int, required=True, help="number of samples N")
        command.add_argument(
            "--expected-batch-size", type=int, help="expected logical batch B; N for full batches"
        )
        duration = command.add_mutually_exclusive_group(required=True)
        duration.add_argument("--steps", type=int, help="optimizer steps")
        duration.add_argument("--epochs", type=float, help="passes over the data, each ceil(N / B) steps")
        command.add_argument("--delta", type=float, required=True, help="δ, well below 1 / N")
        command.add_argument("--sampling", choices=SAMPLINGS, default="poisson")
        command.add_argument("--batch-cap", type=int, help="largest logical batch; default B + 6√B")
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "epsilon":
            command.add_argument(
                "--noise-multiplier", type=float, required=True, help="noise std over sensitivity"
            )
        else:
            command.add_argument("--target-epsilon", type=float, required=True, help="ε of the whole run")
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
            "stated": found.epsilon_stated if math.isfinite(found.epsilon_stated) else None,
            "recomputed": found.epsilon if math.isfinite(found.epsilon) else None,
            "rdp": found.epsilon_rdp if math.isfinite(found.epsilon_rdp) else None,
        },
        "delta": found.delta,
        "steps": found.steps,
        "warnings": list(found.warnings),
    }


def _verified_text(report: dict[str, Any]) -> str:
    stated, recomputed, rdp = (
        rounded_up(math.inf if report["epsilon"][name] is None else report["epsilon"][name])
        for name in ("stated", "recomputed", "rdp")
    )
    lines = [
        f"{report['statement']}: holds",
        f"ε after {report['steps']} steps at δ = {report['delta']:g}:",
        f"  stated      {stated}",
        f"  recomputed  {recomputed}",
        f"  RDP         {rdp}  (cross-check, looser)",
        *(f"warning: {text}" for text in report["warnings"]),
        "A file alone cannot show that the run was made as it says, or that it belongs to given weights.",
    ]
    return "\n".join(lines)


def _report(options: argparse.Namespace) -> dict[str, Any]:
    size, full = options.dataset_size, options.sampling == "full_batch"
    batch = size if full and options.expected_batch_size is None else options.expected_batch_size
    if batch is None:
        raise ConfigurationError("--expected-batch-size is missing. Give it, or --sampling full_batch.")
    if not 1 <= batch <= size or (full and batch != size):
        raise ConfigurationError(
            f"--expected-batch-size {batch} does not fit --dataset-size {size}, {options.sampling}."
        )
    if options.epochs is not None and not (math.isfinite(options.epochs) and options.epochs > 0):
        raise ConfigurationError(f"--epochs {options.epochs} must be positive.")
    steps = options.steps if options.epochs is None else math.ceil(options.epochs * math.ceil(size / batch))
    cap = options.batch_cap
    if cap is None or full:
        cap = size if full else default_batch_cap(dataset_size=size, expected_batch_size=batch)
    if options.command == "noise":
        noise_multiplier = calibrate_noise(
            target_epsilon=options.target_epsilon,
            target_delta=options.delta,
            steps=steps,
            sampling_probability=batch / size,
            dataset_size=size,
            sampling=options.sampling,
            batch_cap=cap,
        )
    else:
        noise_multiplier = options.noise_multiplier
    mechanism = Mechanism(
        dataset_size=size,
        sampling=options.sampling,
        sampling_probability=batch / size,
        batch_cap=cap,
        noise_multiplier=noise_multiplier,
    )
    # Without sampling the closed form is exact, and stands in for both numerical accountants.
    accountants = {name: name for name in ACCOUNTANTS}
    if mechanism.is_unsampled:
        accountants = {"closed_form": "pld", "rdp": "rdp"}
    values = {
        label: epsilon(mechanism, steps, options.delta, accountant=name)
        for label, name in accountants.items()
    }
    return {
        "noise_multiplier": noise_multiplier,
        "sampling": options.sampling,
        "sampling_probability": batch / size,
        "batch_cap": cap,
        "steps": steps,
        "delta": options.delta,
        "epsilon": {name: value if math.isfinite(value) else None for name, value in values.items()},
        "true_positive_rate_bounds": {
            f"{rate:g}": bound for rate, bound in attack_rates(mechanism, steps).items()
        },
    }


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"noise multiplier  {report['noise_multiplier']:.5g}",
        f"sampling          {report['sampling']}, probability {report['sampling_probability']:.6g}, "
        f"at most {report['batch_cap']} samples",
        f"steps             {report['steps']}",
        f"ε at δ = {report['delta']:g}:",
    ]
    roles = {"closed_form": "exact", "pld": "decides", "rdp": "cross-check, looser", "prv": "cross-check"}
    for name, value in report["epsilon"].items():
        lines.append(
            f"  {name.replace('_', ' ').upper()}  {rounded_up(math.inf if value is None else value)}  ({roles[name]})"
        )
    lines.append("best attack: right on used samples at most, if wrong on unused ones at most")
    for rate, bound in report["true_positive_rate_bounds"].items():
        lines.append(f"  {bound:7.2%}  {float(rate):.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
