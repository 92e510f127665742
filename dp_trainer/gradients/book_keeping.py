"""One forward and one backward pass: what gradients are made of is kept until the clip factors are known.

Axes: B sample.

Source: the book-keeping of Bu et al. 2022 (arXiv 2210.00038), on forms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dp_trainer.batches import micro_batch_size
from dp_trainer.errors import UnsupportedOperationError
from dp_trainer.gradients.capture import Settle, Use, capture
from dp_trainer.gradients.forms import Form
from dp_trainer.gradients.independence import check_independence, repeatable
from dp_trainer.gradients.measures import accumulation_dtype
from dp_trainer.gradients.parts import (
    MicroBatch,
    Part,
    PerSampleLoss,
    checked_losses,
    full_precision,
    norms_of,
    trainable_parameters,
)
from dp_trainer.gradients.planner import settle, squared_norms
from dp_trainer.gradients.sharding import is_sharded, on_any_rank, reduced_to_shards
from dp_trainer.privacy.clipping import ClippingFunction


def book_keeping(
    model: nn.Module,
    micro_batch: MicroBatch,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    totals: dict[str, Tensor],
    verified: set[Use] | None = None,
) -> Part:
    """Adds a micro-batch's clipped sum to the totals, from its forms."""
    forms_by_name, losses_B = captured_forms(model, micro_batch, per_sample_loss, settle, verified)
    with full_precision(losses_B.device):
        norms_B = norms_of(add_squares(squared_norms(forms_by_name), losses_B))
        factors_B = clipping(norms_B)
        if is_sharded(model):
            _add_clipped_shards(model, forms_by_name, norms_B, factors_B, totals)
        else:
            _add_clipped(forms_by_name, norms_B, factors_B, totals)
    return Part(norms_B, factors_B, losses_B)


def fill_in(
    model: nn.Module,
    micro_batch: MicroBatch,
    per_sample_loss: PerSampleLoss,
    totals: dict[str, Tensor],
    verified: set[Use] | None = None,
) -> None:
    """Takes part in the calls of other ranks of a sharded model, and adds nothing."""
    _, losses_B = captured_forms(model, micro_batch, per_sample_loss, settle, verified)
    nothing = losses_B.new_zeros(0)
    _add_clipped_shards(model, {}, nothing, nothing, totals)


def captured_forms(
    model: nn.Module,
    micro_batch: MicroBatch,
    per_sample_loss: PerSampleLoss,
    settle: Settle,
    verified: set[Use] | None,
) -> tuple[dict[str, list[Form]], Tensor]:
    """Runs one forward and one backward pass; returns the forms that ``settle`` left, by name, and the losses (B,).

    Raises:
        CertificateError: With ``verified``, if a use not seen before mixes samples up.
    """
    batch_size = micro_batch_size(micro_batch)
    # The very first look comes before anything is kept, so that its passes do not add to the memory of that.
    if verified is not None and not verified and batch_size > 1 and not is_sharded(model):
        verified |= _look(model, micro_batch, per_sample_loss)
    with capture(model, batch_size, settle=settle) as tape:
        losses_B = checked_losses(per_sample_loss(model, micro_batch), batch_size)
        if losses_B.requires_grad:
            losses_B.sum().backward()  # type: ignore[no-untyped-call]
    if verified is not None:
        is_new = batch_size > 1 and not tape.uses <= verified
        # Ranks of a sharded model look together, since every forward pass needs all of them.
        if on_any_rank(is_new, losses_B.device) if is_sharded(model) else is_new:
            _look(model, micro_batch, per_sample_loss)
        if is_new:
            verified |= tape.uses
    return tape.take_forms(), losses_B.detach()


def _look(model: nn.Module, micro_batch: MicroBatch, per_sample_loss: PerSampleLoss) -> set[Use]:
    with repeatable(model):
        return check_independence(model, micro_batch, per_sample_loss)


def add_squares(squares_by_name: dict[str, Tensor], losses_B: Tensor) -> Tensor:
    """Returns the samples' squared norms over all parameters, (B,).

    Raises:
        UnsupportedOperationError: If a parameter's gradient has another number of samples.
    """
    for name, squares_B in squares_by_name.items():
        if squares_B.shape != losses_B.shape:
            raise UnsupportedOperationError(
                f"{name}: its gradient has {squares_B.shape[0]} samples instead of {losses_B.shape[0]}. Freeze it "
                "or set strategy='loop'."
            )
    squares = list(squares_by_name.values())
    dtype = accumulation_dtype(losses_B, *squares)
    if not squares:
        return torch.zeros_like(losses_B, dtype=dtype)
    return torch.stack([squares_B.to(dtype) for squares_B in squares]).sum(0)


def _add_clipped(
    forms_by_name: dict[str, list[Form]], norms_B: Tensor, factors_B: Tensor, totals: dict[str, Tensor]
) -> None:
    kept_B = torch.isfinite(norms_B)
    all_kept = bool(kept_B.all())
    for name in list(forms_by_name):
        # Popped, so that forms are freed as the totals grow.
        for form in forms_by_name.pop(name):
            form = form if all_kept else form.select(kept_B)
            totals[name] = form.weighted_sum(factors_B, totals.get(name))


def _add_clipped_shards(
    model: nn.Module,
    forms_by_name: dict[str, list[Form]],
    norms_B: Tensor,
    factors_B: Tensor,
    totals: dict[str, Tensor],
) -> None:
    """As ``_add_clipped``, for a sharded model: one parameter at a time, the same ones in the same order on all ranks."""
    for name, parameter in trainable_parameters(model).items():
        own: dict[str, Tensor] = {}
        if name in forms_by_name:
            _add_clipped({name: forms_by_name.pop(name)}, norms_B, factors_B, own)
        dtype = accumulation_dtype(parameter)
        total = own.pop(name) if own else factors_B.new_zeros(parameter.shape, dtype=dtype)
        shard = reduced_to_shards(total.to(dtype), name, parameter)
        totals[name] = totals[name].add_(shard) if name in totals else shard
