"""From micro-batches to the clipped sum: strategies with one result and different costs.

Axes: B sample (all micro-batches together), G clipping group, K a parameter's axes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dp_trainer.batches import micro_batch_size, sample_of
from dp_trainer.errors import ConfigurationError, UnsupportedOperationError
from dp_trainer.gradients.capture import Use, capture
from dp_trainer.gradients.forms import Form
from dp_trainer.gradients.independence import check_independence, repeatable
from dp_trainer.gradients.measures import GramCache, accumulation_dtype
from dp_trainer.gradients.planner import squared_norms
from dp_trainer.privacy.clipping import ClippingFunction

MicroBatch = Mapping[str, Any]
PerSampleLoss = Callable[[nn.Module, MicroBatch], Tensor]

# Squares below this lose digits in float32, so such norms are taken for zero: every clipping function then
# lets through at most (sensitivity / γ) · 1e-12.
_SMALLEST_SQUARED_NORM = 1e-24


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


@dataclass(frozen=True, eq=False)
class _Part:
    """One micro-batch's share of the result."""

    norms: Tensor
    factors: Tensor
    losses: Tensor


Strategy = Callable[
    [nn.Module, MicroBatch, PerSampleLoss, ClippingFunction, dict[str, Tensor], set[Use] | None], _Part
]


def clipped_gradient_sum(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    *,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    strategy: str = "automatic",
    verified: set[Use] | None = None,
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
        strategy: ``"automatic"``, ``"book_keeping"`` or ``"loop"``. Costs time
            and memory only; results agree up to rounding.
        verified: If given, the uses of parameters already shown to keep samples
            apart; a micro-batch with another use is checked before it counts, and
            its uses are added. Where a model has its samples may depend on the
            sizes and values of a batch.

    Returns:
        Norms, factors, losses and the clipped sum, samples in the order given.

    Raises:
        ConfigurationError: For an unknown strategy, no trainable parameter, or losses not of shape (B,).
        UnsupportedOperationError: If the exact gradient of some operation is not known.
        CertificateError: With ``verified``, if samples are mixed up.
    """
    if strategy not in STRATEGIES:
        raise ConfigurationError(f"strategy={strategy!r} is unknown; choose from {', '.join(STRATEGIES)}.")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConfigurationError("The model has no trainable parameter: all have requires_grad=False.")
    totals: dict[str, Tensor] = {}
    parts = [
        STRATEGIES[strategy](model, micro_batch, per_sample_loss, clipping, totals, verified)
        for micro_batch in micro_batches
    ]
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


def book_keeping(
    model: nn.Module,
    micro_batch: MicroBatch,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    totals: dict[str, Tensor],
    verified: set[Use] | None = None,
) -> _Part:
    """One forward and one backward; forms are kept until the clip factors are known.

    Source: the book-keeping of Bu et al. 2022 (arXiv 2210.00038), on forms.
    """
    batch_size = micro_batch_size(micro_batch)
    with capture(model, batch_size) as tape:
        losses_B = _checked_losses(per_sample_loss(model, micro_batch), batch_size)
        if losses_B.requires_grad:
            losses_B.sum().backward()  # type: ignore[no-untyped-call]
    if verified is not None and batch_size > 1 and not tape.uses <= verified:
        with repeatable(model):
            check_independence(model, micro_batch, per_sample_loss)
        verified |= tape.uses
    with _full_precision(losses_B.device):
        norms_B, factors_B = _add_clipped(tape.take_forms(), losses_B.detach(), clipping, totals)
    return _Part(norms_B, factors_B, losses_B.detach())


def _add_clipped(
    forms_by_name: dict[str, list[Form]],
    losses_B: Tensor,
    clipping: ClippingFunction,
    totals: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Adds one micro-batch's clipped sum to the totals; returns norms and factors, (B,)."""
    squares_B = torch.zeros_like(losses_B, dtype=accumulation_dtype(losses_B))
    grams = GramCache()
    for name, forms in forms_by_name.items():
        square_B, forms_by_name[name] = squared_norms(forms, grams)
        if square_B.shape != squares_B.shape:
            raise UnsupportedOperationError(
                f"{name}: its gradient has {square_B.shape[0]} samples instead of {squares_B.shape[0]}. Freeze it "
                "or set strategy='loop'."
            )
        squares_B = squares_B + square_B
    norms_B = _norms(squares_B)
    factors_B = clipping(norms_B)
    kept_B = torch.isfinite(norms_B)
    all_kept = bool(kept_B.all())
    for name in list(forms_by_name):
        for form in forms_by_name.pop(name):
            form = form if all_kept else form.select(kept_B)
            totals[name] = form.weighted_sum(factors_B, totals.get(name))
    return norms_B, factors_B


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Norms and sums in full float32: neither autocast nor TensorFloat-32 may round a contribution."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def loop(
    model: nn.Module,
    micro_batch: MicroBatch,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    totals: dict[str, Tensor],
    _verified: set[Use] | None = None,
) -> _Part:
    """One sample at a time by plain autograd: the reference for every other strategy."""
    parts = [
        _one_sample(model, sample_of(micro_batch, index), per_sample_loss, clipping, totals)
        for index in range(micro_batch_size(micro_batch))
    ]
    return _Part(
        *(torch.cat(pieces) for pieces in zip(*((p.norms, p.factors, p.losses) for p in parts), strict=True))
    )


def _one_sample(
    model: nn.Module,
    sample: MicroBatch,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    totals: dict[str, Tensor],
) -> _Part:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses_B = _checked_losses(per_sample_loss(model, sample), 1)
    gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if losses_B.requires_grad:
        gradients = torch.autograd.grad(losses_B.sum(), list(parameters.values()), allow_unused=True)
    used = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    squares_B = functools.reduce(
        torch.add,
        (torch.linalg.vector_norm(g, dtype=accumulation_dtype(g)).square() for g in used.values()),
        losses_B.detach().new_zeros(1, dtype=accumulation_dtype(losses_B)),
    )
    norms_B = _norms(squares_B)
    factors_B = clipping(norms_B)
    if torch.isfinite(norms_B).all():
        for name, gradient in used.items():
            contribution = gradient.to(accumulation_dtype(gradient)) * factors_B.to(
                accumulation_dtype(gradient)
            )
            totals[name] = totals[name].add_(contribution) if name in totals else contribution
    return _Part(norms_B, factors_B, losses_B.detach())


def _norms(squares: Tensor) -> Tensor:
    return torch.where(squares < _SMALLEST_SQUARED_NORM, torch.zeros_like(squares), squares).sqrt()


def _checked_losses(losses: Tensor, batch_size: int) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (batch_size,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ConfigurationError(
            f"per_sample_loss returned {shape} for {batch_size} samples, and must return one loss a sample, of "
            f"shape ({batch_size},). An average over the batch couples samples and breaks the guarantee: use "
            "reduction='none' and average within each sample."
        )
    return losses


STRATEGIES: dict[str, Strategy] = {"automatic": book_keeping, "book_keeping": book_keeping, "loop": loop}
