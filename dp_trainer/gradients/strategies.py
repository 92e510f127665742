"""From micro-batches to the clipped sum: strategies with one result and different costs.

Axes: B sample (all micro-batches together), G clipping group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dp_trainer.errors import ConfigurationError, UnsupportedOperationError
from dp_trainer.gradients.book_keeping import book_keeping, fill_in
from dp_trainer.gradients.capture import Use
from dp_trainer.gradients.measures import accumulation_dtype
from dp_trainer.gradients.one_sample import direct, loop
from dp_trainer.gradients.parts import MicroBatch, Part, PerSampleLoss, Strategy, trainable_parameters
from dp_trainer.gradients.planner import choose_strategy
from dp_trainer.gradients.sharding import put_to_rest
from dp_trainer.gradients.two_pass import two_pass
from dp_trainer.privacy.clipping import ClippingFunction

__all__ = ["STRATEGIES", "ClippedGradientSum", "MicroBatch", "PerSampleLoss", "clipped_gradient_sum"]


@dataclass(frozen=True, eq=False)
class ClippedGradientSum:
    """What one logical batch contributes, before noise.

    Guarantee: adding or removing one sample changes ``gradients``, as one vector,
    by at most the clipping function's sensitivity, up to rounding.

    Args:
        norms: Per-sample gradient norms over all trainable parameters, (B,) in
            the order of the samples; (B, G) where parameters form several groups.
            Not private.
        factors: Clip factors, of the same shape; 0 where the norm is not finite. Not private.
        gradients: Parameter name → Σ_b factor · gradient, in float32 (float64
            for float64 parameters), not noised. Every trainable parameter has an
            entry; a shared one has one entry.
        losses: Per-sample losses (B,). Not private.
    """

    norms: Tensor
    factors: Tensor
    gradients: dict[str, Tensor]
    losses: Tensor

    @property
    def dropped_samples(self) -> int:
        """Number of samples left out because their gradient was NaN or infinite."""
        finite = torch.isfinite(self.norms)
        return int((~(finite if finite.ndim == 1 else finite.all(1))).sum())


def clipped_gradient_sum(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    *,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    strategy: str = "automatic",
    verified: set[Use] | None = None,
    fillers: Iterable[MicroBatch] = (),
) -> ClippedGradientSum:
    """Computes every sample's gradient norm and the sum of the clipped gradients.

    Guarantee: as ``ClippedGradientSum``, provided that each sample's loss depends
    on that sample alone. Adds no noise, and leaves every ``.grad`` as it was.

    Args:
        model: Any module; the parameters with ``requires_grad`` are clipped together.
        micro_batches: The logical batch in pieces that fit in memory, each a
            mapping whose tensors begin with the sample axis; may be empty. Taken one at a time.
        per_sample_loss: ``(model, micro_batch)`` → losses, shape (B,), not averaged.
        clipping: Norms → clip factors.
        strategy: A name in ``STRATEGIES``. Costs time and memory only; results agree up to rounding.
        verified: If given, the uses of parameters already shown to keep samples
            apart; a micro-batch with another use is checked before it counts, and
            its uses are added. Where a model has its samples may depend on the
            sizes and values of a batch.
        fillers: Micro-batches that are computed and count for nothing: they keep the ranks of a sharded
            model in step, where others have more micro-batches.

    Returns:
        Norms, factors, losses and the clipped sum, samples in the order given.

    Raises:
        ConfigurationError: For an unknown strategy, no trainable parameter, or losses not of shape (B,).
        UnsupportedOperationError: If the exact gradient of some operation is not known.
        CertificateError: With ``verified``, if samples are mixed up.
    """
    if strategy not in STRATEGIES:
        raise ConfigurationError(f"strategy={strategy!r} is unknown; choose from {', '.join(STRATEGIES)}.")
    if put_to_rest(model) and strategy not in ("automatic", "book_keeping"):
        raise UnsupportedOperationError(
            f"strategy={strategy!r} needs the gradients of whole parameters, and this model is spread over ranks. Set "
            "strategy='automatic'."
        )
    return unchecked_sum(
        model,
        micro_batches,
        per_sample_loss=per_sample_loss,
        clipping=clipping,
        strategy=strategy,
        verified=verified,
        fillers=fillers,
    )


def unchecked_sum(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    *,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    strategy: str,
    verified: set[Use] | None = None,
    fillers: Iterable[MicroBatch] = (),
) -> ClippedGradientSum:
    """As ``clipped_gradient_sum``; of a sharded model also one sample at a time, the same one on all ranks."""
    put_to_rest(model)
    parameters = trainable_parameters(model)
    if not parameters:
        raise ConfigurationError("The model has no trainable parameter: all have requires_grad=False.")
    totals: dict[str, Tensor] = {}
    parts = [
        STRATEGIES[strategy](model, micro_batch, per_sample_loss, clipping, totals, verified)
        for micro_batch in micro_batches
    ]
    for micro_batch in fillers:
        fill_in(model, micro_batch, per_sample_loss, totals, verified)
    empty = torch.zeros(0, device=next(iter(parameters.values())).device)
    return ClippedGradientSum(
        norms=torch.cat([part.norms for part in parts]) if parts else empty,
        factors=torch.cat([part.factors for part in parts]) if parts else empty,
        gradients={name: _full(totals.pop(name, None), p) for name, p in parameters.items()},
        losses=torch.cat([part.losses for part in parts]) if parts else empty,
    )


def _full(total: Tensor | None, parameter: Tensor) -> Tensor:
    """The parameter's sum in its accumulation dtype, zeros where no sample used it."""
    dtype = accumulation_dtype(parameter)
    return torch.zeros_like(parameter, dtype=dtype) if total is None else total.to(dtype)


def automatic(
    model: nn.Module,
    micro_batch: MicroBatch,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    totals: dict[str, Tensor],
    verified: set[Use] | None = None,
) -> Part:
    """Takes the planner's choice for each micro-batch."""
    strategy = STRATEGIES[choose_strategy(model, micro_batch)]
    return strategy(model, micro_batch, per_sample_loss, clipping, totals, verified)


STRATEGIES: dict[str, Strategy] = {
    "automatic": automatic,
    "book_keeping": book_keeping,
    "two_pass": two_pass,
    "direct": direct,
    "loop": loop,
}
