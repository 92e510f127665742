"""From one logical batch to the privatized mean gradient: the only place where noise meets data.

Together with ``privacy/plan.py`` this is what an auditor needs to read: the
tensors of a release here, its numbers there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dp_trainer.gradients.capture import Use
from dp_trainer.gradients.halving import Halving
from dp_trainer.gradients.strategies import MicroBatch, PerSampleLoss, clipped_gradient_sum
from dp_trainer.privacy.noise import NoiseGenerator
from dp_trainer.privacy.plan import PrivacyPlan


@dataclass(frozen=True, eq=False)
class ReleaseReport:
    """What is known about the samples of one release. Not private: for the trainer's own eyes.

    Args:
        mean_loss: Mean loss of the drawn samples that were kept, a scalar; 0 for an empty draw.
        samples: Number of samples drawn.
        dropped_samples: Number left out because their gradient was NaN or infinite.
        clipped_fraction: Share of the samples whose gradient was made shorter; 0 for an empty draw.
    """

    mean_loss: Tensor
    samples: int
    dropped_samples: int
    clipped_fraction: float


def release(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    *,
    per_sample_loss: PerSampleLoss,
    plan: PrivacyPlan,
    noise: NoiseGenerator,
    strategy: str,
    rounding_margin: float,
    verified: set[Use] | None = None,
    prepare: Callable[[MicroBatch], MicroBatch] = lambda micro_batch: micro_batch,
    halving: Halving | None = None,
) -> ReleaseReport:
    """Puts the privatized mean gradient into ``.grad`` of every trainable parameter.

    Guarantee: with ``S`` the clipped sum over the drawn samples, ``.grad`` becomes
    ``(S + N(0, (noise_multiplier · sensitivity)²)) / expected_batch_size``, noise
    drawn once, also for an empty draw and for parameters that no sample used.
    What ``.grad`` held before is discarded.

    Args:
        model: The unwrapped model.
        micro_batches: The drawn samples; may be empty.
        per_sample_loss: ``(model, micro_batch)`` → losses (B,).
        plan: The run's numbers.
        noise: The run's noise generator.
        strategy: See ``clipped_gradient_sum``.
        rounding_margin: Relative extra noise that covers rounding, from the certificate.
        verified: See ``clipped_gradient_sum``.
        prepare: Moves one micro-batch to the model's device.
        halving: How micro-batches were halved so far; updated where memory runs out.
    """
    clipped = (halving or Halving()).run(
        micro_batches,
        lambda pieces: clipped_gradient_sum(
            model,
            map(prepare, pieces),
            per_sample_loss=per_sample_loss,
            clipping=plan.clipping,
            strategy=strategy,
            verified=verified,
        ),
    )
    noise_std = plan.noise_std * (1 + rounding_margin)
    parameters = dict(model.named_parameters())
    for name in list(clipped.gradients):
        # Popped, so that the float32 sum is freed as soon as it is written.
        total = clipped.gradients.pop(name)
        # The divisor is a public constant: dividing by the drawn size would break the sensitivity bound.
        noise.add_noise_(total, noise_std, divisor=plan.divisor)
        parameters[name].grad = total.to(parameters[name].dtype)
    kept = torch.isfinite(clipped.norms)
    return ReleaseReport(
        mean_loss=torch.where(kept, clipped.losses, 0.0).sum() / max(1, int(kept.sum())),
        samples=clipped.norms.shape[0],
        dropped_samples=clipped.dropped_samples,
        clipped_fraction=float((clipped.factors * clipped.norms < clipped.norms).float().mean())
        if len(kept)
        else 0.0,
    )
