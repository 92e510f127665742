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

from dp_trainer.errors import ConfigurationError, UnsupportedOperationError
from dp_trainer.gradients.book_keeping import add_squares, captured_forms
from dp_trainer.gradients.capture import Use
from dp_trainer.gradients.forms import Form, sum_squared_norms
from dp_trainer.gradients.measures import GramCache, accumulation_dtype, squared_lengths
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
    gradients = _gradients(model, (again_B * factors_B.to(again_B.dtype)).sum())
    squares = [squared_lengths(g.flatten()[None]) for g in gradients.values()]
    length = torch.cat(squares).sum().sqrt() if squares else norms_B.new_zeros(())
    if not torch.isfinite(length):
        return direct(model, micro_batch, per_sample_loss, clipping, totals)
    if length > (factors_B * norms_B).sum() * (1 + _LARGEST_DIFFERENCE):
        raise UnsupportedOperationError(
            "strategy='two_pass': the weighted gradients of the second pass are longer together than the norms of "
            "the first allow. Set strategy='book_keeping', or 'loop', and report the model."
        )
    for name, gradient in gradients.items():
        # A copy: autograd may give two parameters the same tensor.
        added = gradient.to(accumulation_dtype(gradient), copy=name not in totals)
        totals[name] = totals[name].add_(added) if name in totals else added
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
            # Whole: the second pass multiplies also what has no gradient, and zero times infinity is NaN.
            squares[name] = sum_squared_norms([form])

    forms_by_name, losses_B = captured_forms(model, micro_batch, per_sample_loss, measure, verified)
    both = sorted(squares.keys() & forms_by_name.keys())
    if both:
        raise UnsupportedOperationError(
            f"{both[0]}: it was measured alone, and has more gradients. Set strategy='book_keeping'."
        )
    with full_precision(losses_B.device):
        # Not what a planner would build: autograd rounds otherwise, so these need their allowance for rounding.
        grams = GramCache()
        squares |= {name: sum_squared_norms(forms, grams) for name, forms in forms_by_name.items()}
        return norms_of(add_squares(squares, losses_B)), losses_B


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = trainable_parameters(model)
    if not loss.requires_grad:
        return {}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}


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
