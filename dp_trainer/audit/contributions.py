"""What one sample can change, measured without noise through the trainer's own step.

Axes: S sample of the audit, E entry of all trainable parameters in one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dp_trainer.audit.canaries import CanaryTrainer, canary, canary_length, flat
from dp_trainer.audit.findings import Finding
from dp_trainer.batches import spread_by_length
from dp_trainer.gradients.certificate import LARGEST_EXCESS
from dp_trainer.gradients.independence import repeatable
from dp_trainer.trainer import DPTrainer

_POOL = 64
# What rounding explains, relative to the contributions; 16-bit arithmetic rounds more where neighbours differ.
_TOLERANCE, _TOLERANCE_16_BITS = 5e-3, 0.1


def real_samples(audited: DPTrainer, count: int) -> list[Any]:
    """The first samples' cross-section by length."""
    rows = range(min(_POOL, len(audited.train_dataset)))
    return spread_by_length([audited.train_dataset[row] for row in rows], count)


def audited_samples(audited: DPTrainer, count: int) -> list[Any]:
    """Real samples, and two canaries that pull one entry in opposite directions, one twice as hard."""
    real = real_samples(audited, count)
    length = canary_length(audited.plan.clipping)
    return [*real, canary(real[0], 0, length), canary(real[0], 0, -length / 2)]


def check_contributions(audited: DPTrainer, samples: Sequence[Any]) -> list[Finding]:
    """Compares clipped sums with one sample at a time, and looks for neighbours further apart than claimed.

    Guarantee: deterministic; a finding that disagrees is a fault, up to the arithmetic's rounding.

    Args:
        audited: The run in question.
        samples: What ``audited_samples`` returned.
    """
    trainer = CanaryTrainer(
        audited=audited, samples=samples, entries=2, steps=4 * len(samples) + 8, noised=False
    )
    tolerance = _tolerance(audited)
    expected_SE = torch.stack([_expected(trainer, sample) for sample in samples])
    single_SE = torch.stack([flat(trainer.released(trainer.batch([sample]))) for sample in samples])
    together_E = flat(trainer.released(trainer.batch(samples, samples_per_micro_batch=2)))
    without_SE = torch.stack(
        [
            flat(trainer.released(trainer.batch([s for j, s in enumerate(samples) if j != i])))
            for i in range(len(samples))
        ]
    )
    empty_E = flat(trainer.released(trainer.batch([])))
    bound = audited.plan.clipping.sensitivity
    size = float(expected_SE.norm(dim=1).sum())
    margin = LARGEST_EXCESS if tolerance == _TOLERANCE else tolerance
    return [
        _at_most(
            "one sample's contribution", single_SE.norm(dim=1).max() / bound, 1.0, margin, "sensitivities"
        ),
        _at_most(
            "change of the sum when one sample leaves",
            (together_E - without_SE).norm(dim=1).max() / bound,
            1.0,
            margin if tolerance != _TOLERANCE else tolerance,
            "sensitivities",
        ),
        _at_most(
            "difference from one sample at a time",
            (single_SE - expected_SE).norm(dim=1).max() / bound,
            0.0,
            tolerance,
            "sensitivities",
        ),
        _at_most(
            "difference of a logical batch from the sum of its samples",
            (together_E - expected_SE.sum(0)).norm() / size,
            0.0,
            tolerance,
            "of the sum of lengths",
        ),
        _divisor(single_SE, together_E, expected_SE, tolerance),
        _at_most("size of an empty draw's sum", empty_E.norm() / bound, 0.0, 1e-9, "sensitivities"),
        _counted(trainer, 2 * len(samples) + 2),
    ]


def _expected(trainer: CanaryTrainer, sample: Any) -> Tensor:
    """The contribution by plain autograd on the sample alone: factor · gradient, in float64 (E,)."""
    parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.train()
    with repeatable(trainer.model):
        loss = trainer.loss_of(sample)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradient_E = flat(
        {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(parameters.items(), found, strict=True)
        }
    )
    factor: Tensor = trainer.plan.clipping(gradient_E.norm()[None])[0]
    return factor * gradient_E


def _divisor(single_SE: Tensor, together_E: Tensor, expected_SE: Tensor, tolerance: float) -> Finding:
    """Whether one sample and a whole logical batch are divided by the same, stated constant."""
    one = _ratio(single_SE[-1], expected_SE[-1])
    many = _ratio(together_E, expected_SE.sum(0))
    return Finding(
        layer="exact",
        name="divisor",
        agrees=max(abs(one - 1), abs(many - 1)) <= tolerance,
        measured=f"means are {one:.5f} of the expected for 1 sample, {many:.5f} for {len(expected_SE)}",
        claimed="1: sums are divided by the stated constant, whatever was drawn",
    )


def _ratio(released_E: Tensor, expected_E: Tensor) -> float:
    size = float(expected_E @ expected_E)
    return float(released_E @ expected_E) / size if size else float("nan")


def _counted(trainer: CanaryTrainer, releases: int) -> Finding:
    counted = trainer.accountant.steps_spent
    return Finding(
        layer="exact",
        name="releases counted",
        agrees=counted == releases,
        measured=f"{counted} of {releases}, an empty draw among them",
        claimed="each release is counted once",
    )


def _at_most(name: str, measured: Tensor | float, limit: float, tolerance: float, unit: str) -> Finding:
    value = float(measured)
    # Not "value > limit": a NaN must not pass.
    return Finding(
        layer="exact",
        name=name,
        agrees=value <= limit + tolerance,
        measured=f"{value:.6g} {unit}",
        claimed=f"at most {limit:g} (rounding: {tolerance:g})",
    )


def _tolerance(audited: DPTrainer) -> float:
    narrow = audited.args.bf16 or any(
        p.dtype in (torch.bfloat16, torch.float16) for p in audited.model.parameters() if p.requires_grad
    )
    return _TOLERANCE_16_BITS if narrow else _TOLERANCE
