"""From one logical batch to the privatized mean gradient: the only place where noise meets data.

Together with ``privacy/plan.py`` this is what an auditor needs to read: the
tensors of a release here, its numbers there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dp_trainer.distributed import Ranks
from dp_trainer.gradients.capture import Use
from dp_trainer.gradients.halving import Halving
from dp_trainer.gradients.strategies import (
    ClippedGradientSum,
    MicroBatch,
    PerSampleLoss,
    clipped_gradient_sum,
)
from dp_trainer.privacy.noise import NoiseGenerator
from dp_trainer.privacy.plan import PrivacyPlan

ALONE = Ranks(0, 1, torch.device("cpu"))


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
    ranks: Ranks = ALONE,
    fillers: Sequence[MicroBatch] = (),
) -> ReleaseReport:
    """Puts the privatized mean gradient into ``.grad`` of every trainable parameter.

    Guarantee: with ``S`` the clipped sum over the drawn samples of all ranks, ``.grad`` becomes
    ``(S + N(0, (noise_multiplier · sensitivity)²)) / divisor`` with the plan's numbers, noise
    drawn once, also for an empty draw and for parameters that no sample used.
    What ``.grad`` held before is discarded.

    Args:
        model: The unwrapped model.
        micro_batches: This rank's share of the drawn samples; may be empty.
        per_sample_loss: ``(model, micro_batch)`` → losses (B,).
        plan: The run's numbers.
        noise: This rank's noise generator.
        strategy: See ``clipped_gradient_sum``.
        rounding_margin: Relative extra noise that covers rounding, from the certificate.
        verified: See ``clipped_gradient_sum``.
        prepare: Moves one micro-batch to the model's device.
        halving: How micro-batches were halved so far; updated where memory runs out.
        ranks: The processes that make this release together; all of them call it.
        fillers: See ``clipped_gradient_sum``.
    """

    def attempt(pieces: Iterable[MicroBatch]) -> ClippedGradientSum:
        return clipped_gradient_sum(
            model,
            map(prepare, pieces),
            per_sample_loss=per_sample_loss,
            clipping=plan.clipping,
            strategy=strategy,
            verified=verified,
            fillers=map(prepare, fillers),
        )

    clipped = (halving or Halving()).run(micro_batches, attempt)
    # Each rank's noise covers all ranks' contributions, on whatever device they were rounded.
    noise_std = plan.noise_std * (1 + ranks.most(rounding_margin))
    parameters = dict(model.named_parameters())
    entries = sum(parameters[name].numel() for name in clipped.gradients)
    noise_std += plan.noise_multiplier * noise.added_sensitivity(noise_std, entries)
    # The divisor is a public constant: dividing by the drawn size would break the sensitivity bound.
    for name, mean in ranks.add_noise_once_(clipped.gradients, noise, noise_std, divisor=plan.divisor):
        parameters[name].grad = mean.to(parameters[name].dtype)
    return _report(clipped, ranks)


def _report(clipped: ClippedGradientSum, ranks: Ranks) -> ReleaseReport:
    """What is known of all ranks' samples."""
    kept = torch.isfinite(clipped.norms)
    shortened = clipped.factors * clipped.norms < clipped.norms
    losses = torch.where(kept, clipped.losses, 0.0).sum()
    counts = [torch.as_tensor(len(kept), device=kept.device), kept.sum(), shortened.sum()]
    loss, samples, used, short = ranks.total(
        torch.stack([losses.float(), *(c.float() for c in counts)])
    ).tolist()
    return ReleaseReport(
        mean_loss=torch.tensor(loss / max(1, used), device=kept.device),
        samples=int(samples),
        dropped_samples=int(samples - used),
        clipped_fraction=short / max(1, samples),
    )
