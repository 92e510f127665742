"""Norms first, then an ordinary backward pass of the weighted losses: the memory of an ordinary step.

The first pass measures each use as its gradient arrives and keeps nothing. The
second is a plain forward and backward pass of Σ factor · loss, so whatever
wraps the model's own backward pass works, and its arithmetic is what the price
is: one more forward pass and one more backward pass towards the inputs.

Axes: B sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dp_trainer.batches import micro_batch_size
from dp_trainer.errors import ConfigurationError, UnsupportedOperationError
from dp_trainer.gradients.book_keeping import add_squares, verify_uses
from dp_trainer.gradients.capture import Use, capture
from dp_trainer.gradients.forms import Form, sum_squared_norms
from dp_trainer.gradients.measures import accumulation_dtype
from dp_trainer.gradients.one_sample import direct
from dp_trainer.gradients.parts import (
    MicroBatch,
    Part,
    PerSampleLoss,
    checked_losses,
    full_precision,
    norms_of,
    trainable_parameters,
)
from dp_trainer.gradients.planner import squared_norms, without_unused_positions
from dp_trainer.privacy.clipping import ClippingFunction

# How far the second forward pass may be from the first: order of additions, not other dropout.
_LARGEST_DIFFERENCE = 1e-3


def two_pass(
    model: nn.Module,
    micro_batch: MicroBatch,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    totals: dict[str, Tensor],
    verified: set[Use] | None = None,
) -> Part:
    """Adds a micro-batch's clipped sum to the totals, by two forward and two backward passes.

    Raises:
        ConfigurationError: If the second forward pass does not repeat the first.
    """
    device = next(iter(trainable_parameters(model).values())).device
    before = _generator_states(device)
    norms_B, losses_B = _measure(model, micro_batch, per_sample_loss, verified)
    if not torch.isfinite(norms_B).all():
        # Zero times infinity is NaN, so a sample that does not count must not be in the sum at all.
        return direct(model, micro_batch, per_sample_loss, clipping, totals)
    factors_B = clipping(norms_B)
    _restore(before, device)
    again_B = checked_losses(per_sample_loss(model, micro_batch), len(losses_B))
    if not torch.allclose(again_B.detach(), losses_B, rtol=_LARGEST_DIFFERENCE, atol=_LARGEST_DIFFERENCE):
        raise ConfigurationError(
            "strategy='two_pass': the second forward pass gave other losses than the first, so the norms are not "
            "those of the gradients. The model draws chance from outside torch's generators, or changes itself. "
            "Set strategy='book_keeping'."
        )
    if again_B.requires_grad:
        _add_gradients(model, (again_B * factors_B.to(again_B.dtype)).sum(), totals)
    return Part(norms_B, factors_B, losses_B)


def _measure(
    model: nn.Module, micro_batch: MicroBatch, per_sample_loss: PerSampleLoss, verified: set[Use] | None
) -> tuple[Tensor, Tensor]:
    """Norms (B,) and losses (B,); of what is used once nothing is kept but its length."""
    squares: dict[str, Tensor] = {}
    device = next(iter(trainable_parameters(model).values())).device

    def measure(name: str, form: Form) -> None:
        if name in squares:
            raise UnsupportedOperationError(
                f"{name}: its only use gave two gradients. Set strategy='book_keeping'."
            )
        with full_precision(device):
            squares[name] = sum_squared_norms([without_unused_positions(form)])

    batch_size = micro_batch_size(micro_batch)
    with capture(model, batch_size, settle=measure) as tape:
        losses_B = checked_losses(per_sample_loss(model, micro_batch), batch_size)
        if losses_B.requires_grad:
            losses_B.sum().backward()  # type: ignore[no-untyped-call]
    losses_B = losses_B.detach()
    verify_uses(tape.uses, verified, model, micro_batch, per_sample_loss)
    forms_by_name = tape.take_forms()
    both = sorted(squares.keys() & forms_by_name.keys())
    if both:
        raise UnsupportedOperationError(
            f"{both[0]}: it was measured alone, and has more gradients. Set strategy='book_keeping'."
        )
    with full_precision(losses_B.device):
        squares |= squared_norms(forms_by_name)
        return norms_of(add_squares(squares, losses_B)), losses_B


def _add_gradients(model: nn.Module, loss: Tensor, totals: dict[str, Tensor]) -> None:
    parameters = trainable_parameters(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and name in totals:
            totals[name].add_(gradient)
        elif gradient is not None:
            # A copy: autograd may give two parameters the same tensor.
            totals[name] = gradient.to(accumulation_dtype(gradient), copy=True)


def _generator_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that dropout draws from: the CPU's, and the device's own."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
