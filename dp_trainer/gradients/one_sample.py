"""One sample at a time by plain autograd: the reference, and the fastest way for long samples alone.

Nothing is captured here, so every model is exact that autograd can differentiate.

Axes: B sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dp_trainer.batches import micro_batch_size, sample_of
from dp_trainer.gradients.capture import Use
from dp_trainer.gradients.checkpointing import refuse_reentrant
from dp_trainer.gradients.measures import accumulation_dtype
from dp_trainer.gradients.parts import (
    MicroBatch,
    Part,
    PerSampleLoss,
    checked_losses,
    joined,
    norms_of,
    trainable_parameters,
)
from dp_trainer.gradients.sharding import gradients_of_equal_losses, is_sharded, put_to_rest, squared_length
from dp_trainer.privacy.clipping import ClippingFunction


def loop(
    model: nn.Module,
    micro_batch: MicroBatch,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    totals: dict[str, Tensor],
    _verified: set[Use] | None = None,
) -> Part:
    """The reference for every other strategy: each gradient is scaled, then added."""
    parts = []
    for gradients, part in _each_sample(model, micro_batch, per_sample_loss, clipping):
        parts.append(part)
        if torch.isfinite(part.norms).all():
            factor = float(part.factors)
            for name, gradient in gradients.items():
                gradient = gradient.to(accumulation_dtype(gradient))
                contribution = gradient * factor
                totals[name] = totals[name] + contribution if name in totals else contribution
    return joined(parts)


def direct(
    model: nn.Module,
    micro_batch: MicroBatch,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    totals: dict[str, Tensor],
    _verified: set[Use] | None = None,
) -> Part:
    """As ``loop``, with fewer passes over the gradients: scaled and added to the totals in one."""
    parts = []
    for gradients, part in _each_sample(model, micro_batch, per_sample_loss, clipping):
        parts.append(part)
        # The device waits here once a sample.
        norm, factor = torch.cat([part.norms, part.factors]).tolist()
        for name in list(gradients) if math.isfinite(norm) else ():
            gradient = gradients.pop(name)
            if name in totals:
                totals[name].add_(gradient, alpha=factor)
            else:
                # Not in place: autograd may give two parameters the same tensor.
                totals[name] = gradient.to(accumulation_dtype(gradient)) * factor
    return joined(parts)


def _each_sample(
    model: nn.Module, micro_batch: MicroBatch, per_sample_loss: PerSampleLoss, clipping: ClippingFunction
) -> Iterator[tuple[dict[str, Tensor], Part]]:
    """Yields one sample's gradients by name, and its part."""
    refuse_reentrant(model)
    for index in range(micro_batch_size(micro_batch)):
        gradients, losses_B, norms_B = _gradients(model, sample_of(micro_batch, index), per_sample_loss)
        yield gradients, Part(norms_B, clipping(norms_B), losses_B)


def _gradients(
    model: nn.Module, sample: MicroBatch, per_sample_loss: PerSampleLoss
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One sample's gradients by name, its loss (1,) and its norm (1,)."""
    put_to_rest(model)
    parameters, sharded = trainable_parameters(model), is_sharded(model)
    losses_B = checked_losses(per_sample_loss(model, sample), 1)
    used: dict[str, Tensor] = {}
    if sharded:
        used = gradients_of_equal_losses(parameters, losses_B.sum())
    elif losses_B.requires_grad:
        gradients = torch.autograd.grad(losses_B.sum(), list(parameters.values()), allow_unused=True)
        used = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    squares_B = losses_B.detach().new_zeros(1, dtype=accumulation_dtype(losses_B))
    for gradient in used.values():
        squares_B = squares_B + squared_length(gradient)
    return used, losses_B.detach(), norms_of(squares_B)
