"""What one micro-batch gives, and what all strategies share.

Axes: B sample, G clipping group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dp_trainer.errors import ConfigurationError
from dp_trainer.gradients.capture import Use
from dp_trainer.privacy.clipping import ClippingFunction

MicroBatch = Mapping[str, Any]
PerSampleLoss = Callable[[nn.Module, MicroBatch], Tensor]

# Squares below this lose digits in float32, so such norms are taken for zero: every clipping function then
# lets through at most (sensitivity / γ) · 1e-12.
_SMALLEST_SQUARED_NORM = 1e-24


@dataclass(frozen=True, eq=False)
class Part:
    """One micro-batch's norms, clip factors and losses, (B,) or (B, G)."""

    norms: Tensor
    factors: Tensor
    losses: Tensor


def joined(parts: Sequence[Part]) -> Part:
    """Returns several parts as one, samples in the order given."""
    return Part(
        torch.cat([part.norms for part in parts]),
        torch.cat([part.factors for part in parts]),
        torch.cat([part.losses for part in parts]),
    )


Strategy = Callable[
    [nn.Module, MicroBatch, PerSampleLoss, ClippingFunction, dict[str, Tensor], set[Use] | None], Part
]
"""Adds a micro-batch's clipped sum to the totals, by parameter name, and returns the rest of what it gives."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that are clipped together, by name; a shared one stands once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def norms_of(squares: Tensor) -> Tensor:
    """Returns the roots of squared norms, zero where squares are too small to have digits."""
    return torch.where(squares < _SMALLEST_SQUARED_NORM, torch.zeros_like(squares), squares).sqrt()


def checked_losses(losses: Tensor, batch_size: int) -> Tensor:
    """Returns the losses.

    Raises:
        ConfigurationError: If they are not one a sample.
    """
    if not isinstance(losses, Tensor) or losses.shape != (batch_size,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigurationError(
            f"per_sample_loss returned {shape} for {batch_size} samples, and must return one loss a sample, of "
            f"shape ({batch_size},). An average over the batch couples samples and breaks the guarantee: use "
            "reduction='none' and average within each sample."
        )
    return losses


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Norms and sums in full float32: neither autocast nor TensorFloat-32 may round a contribution."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
