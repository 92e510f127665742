"""Checks the engine on real samples before the first release.

Per-sample gradients of the chosen strategy are held against one-sample-at-a-time
autograd on the same samples without their padding and neighbours, and the
clipped sum against the reference's. What passes is exact on this model, with
this loss; what does not is refused, by name, before any noise is drawn.

Axes: B sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dp_trainer.batches import select, split_micro_batch
from dp_trainer.errors import CertificateError
from dp_trainer.gradients.strategies import (
    ClippedGradientSum,
    MicroBatch,
    PerSampleLoss,
    clipped_gradient_sum,
)
from dp_trainer.privacy.clipping import ClippingFunction, FlatClipping

# Largest relative difference that rounding explains, by the coarsest dtype in the computation.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# Norms and sums come from the same tensors, so one contribution may exceed the sensitivity by float32
# rounding alone, whatever the model's dtype.
_LARGEST_EXCESS = 1e-4
_PADDED_COLUMNS = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "labels",
    "special_tokens_mask",
}
_DROPOUTS = frozenset(
    {
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        torch.dropout,
    }
)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was measured on real samples before the first release.

    Args:
        samples: Number of samples compared.
        strategy: The strategy that was checked.
        clipping_norm: The bound used for comparing sums, near the samples' median norm.
        norm_error: Largest relative difference of a norm from the reference.
        sum_error: Difference of the clipped sum from the reference, relative to the samples' summed contributions.
        largest_contribution: Largest single contribution over the sensitivity; at most 1 up to rounding.
        tolerance: What norm and sum errors were held against.
    """

    samples: int
    strategy: str
    clipping_norm: float
    norm_error: float
    sum_error: float
    largest_contribution: float
    tolerance: float

    @property
    def rounding_margin(self) -> float:
        """The relative amount of extra noise that covers rounding of contributions."""
        return max(1e-6, 4 * (self.largest_contribution - 1))

    def describe(self) -> dict[str, Any]:
        """Returns all fields, for the privacy statement."""
        return {**dataclasses.asdict(self), "rounding_margin": self.rounding_margin}


def certify(
    model: nn.Module,
    micro_batch: MicroBatch,
    *,
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    strategy: str = "automatic",
    computation_dtype: torch.dtype | None = None,
) -> Certificate:
    """Compares a strategy with the reference on one micro-batch of real samples.

    Guarantee: on return, each sample's norm and the clipped sum agree with plain
    autograd on that sample alone, without padding, and no single contribution
    exceeds the sensitivity; all within the tolerance of the dtype. Dropout is
    off during the comparison; the model's mode, gradients, buffers and the global
    generators are left as they were.

    Args:
        model: The model, in the mode that training will use.
        micro_batch: A few samples, best of unequal lengths.
        per_sample_loss: As in ``clipped_gradient_sum``.
        clipping: The run's clipping function.
        strategy: The strategy to check.
        computation_dtype: The dtype of autocast inside ``per_sample_loss``, if any. Samples whose gradient is
            NaN or infinite are not compared, as they are never released.

    Raises:
        CertificateError: If samples influence each other, a norm or the sum is
            inexact, a buffer is updated from samples, or a contribution is too large.
    """
    with _repeatable(model):
        alone = [without_padding(sample) for sample in split_micro_batch(micro_batch)]
        norms_B = _run(model, alone, per_sample_loss, FlatClipping(1.0), "loop").norms
        finite = torch.isfinite(norms_B).nonzero().flatten().tolist()
        if not finite:
            raise CertificateError(
                f"All {len(alone)} samples looked at have NaN or infinite gradients. Check the data, the model's "
                "weights, and bf16 against float32."
            )
        micro_batch, alone, norms_B = select(micro_batch, finite), [alone[i] for i in finite], norms_B[finite]
        count = len(finite)
        bound = max(float(norms_B.median()), 1e-12)
        flat = FlatClipping(bound)
        engine = _run(model, [micro_batch], per_sample_loss, flat, strategy)
        expected = _run(model, alone, per_sample_loss, flat, "loop")
        singles = [_run(model, [s], per_sample_loss, clipping, strategy) for s in alone]
        tolerance = _tolerance(model, computation_dtype)
        norm_error = float(((engine.norms - norms_B).abs() / norms_B.clamp(min=1e-12)).max())
        sum_error = _distance(engine.gradients, expected.gradients) / (bound * count)
        if norm_error > tolerance or sum_error > tolerance:
            by_itself = torch.cat([_run(model, [s], per_sample_loss, flat, strategy).norms for s in alone])
            raise _disagreement(engine, expected, by_itself, norms_B, tolerance)
    largest = max(_length(single.gradients) for single in singles) / clipping.sensitivity
    if largest > 1 + _LARGEST_EXCESS:
        raise CertificateError(
            f"One sample contributes {largest:.5f} times the sensitivity with strategy={strategy!r}. "
            "This breaks the privacy bound: set strategy='loop' and report the model."
        )
    return Certificate(
        samples=count,
        strategy=strategy,
        clipping_norm=bound,
        norm_error=norm_error,
        sum_error=sum_error,
        largest_contribution=largest,
        tolerance=tolerance,
    )


def without_padding(sample: MicroBatch) -> dict[str, Any]:
    """One sample's micro-batch, cut to the columns that its attention mask keeps.

    A sample with columns of unknown meaning, or with targets under its padding,
    is returned whole.
    """
    mask = sample.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.any():
        return dict(sample)
    kept = mask[0].bool()
    columns = {n: v for n, v in sample.items() if isinstance(v, Tensor) and v.shape[1:2] == mask.shape[1:]}
    targets = columns.get("labels")
    if not columns.keys() <= _PADDED_COLUMNS or (targets is not None and (targets[:, ~kept] != -100).any()):
        return dict(sample)
    return {name: value[:, kept] if name in columns else value for name, value in sample.items()}


def _run(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    strategy: str,
) -> ClippedGradientSum:
    torch.manual_seed(0)
    return clipped_gradient_sum(
        model, micro_batches, per_sample_loss=per_sample_loss, clipping=clipping, strategy=strategy
    )


def _disagreement(
    engine: ClippedGradientSum,
    expected: ClippedGradientSum,
    by_itself: Tensor,
    norms_B: Tensor,
    tolerance: float,
) -> CertificateError:
    """Tells coupled samples from an inexact rule, and names the parameter that disagrees most."""
    worst = max(engine.gradients, key=lambda n: float((engine.gradients[n] - expected.gradients[n]).norm()))
    norms = f"norms {_listed(engine.norms)} together, {_listed(norms_B)} one at a time"
    exact_alone = float(((by_itself - norms_B).abs() / norms_B.clamp(min=1e-12)).max()) <= tolerance
    if exact_alone:
        return CertificateError(
            f"{worst}: a sample's gradient changes with its neighbours in the micro-batch or with its padding "
            f"({norms}). Then clipping one sample does not bound its influence. Usual causes: a loss averaged "
            "over the batch's tokens, BatchNorm, an in-batch or load-balancing loss, packed rows, a missing "
            "attention mask. Use a loss and layers that treat each sample alone."
        )
    return CertificateError(
        f"{worst}: the per-sample gradient is not exact ({norms}). Set strategy='loop' for this model, freeze "
        "the parameter, or add an operation rule with @operation_rule."
    )


def _listed(values: Tensor) -> str:
    return "[" + ", ".join(f"{float(v):.4g}" for v in values.flatten()[:4]) + "]"


def _length(gradients: Mapping[str, Tensor]) -> float:
    return float(torch.stack([g.norm().double() for g in gradients.values()]).norm())


def _distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return _length({name: first[name] - second[name] for name in first})


def _tolerance(model: nn.Module, computation_dtype: torch.dtype | None) -> float:
    dtypes = {p.dtype for p in model.parameters()} | ({computation_dtype} if computation_dtype else set())
    return max(_TOLERANCES.get(dtype, _TOLERANCES[torch.float32]) for dtype in dtypes)


@contextlib.contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """Turns dropout off, isolates the global generators, and holds buffers still."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), _WithoutDropout():
        yield
    changed = [name for name, buffer in model.named_buffers() if not _equal(buffer, buffers.get(name))]
    for name, buffer in model.named_buffers():
        if name in changed and name in buffers and buffer.shape == buffers[name].shape:
            with torch.no_grad():
                buffer.copy_(buffers[name])
    if changed:
        raise CertificateError(
            f"{changed[0]}: this buffer is updated from the samples in the forward pass, without noise, and is "
            "saved with the model. Replace the layer (GroupNorm or LayerNorm for BatchNorm)."
        )


def _equal(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and buffer.shape == before.shape and torch.equal(buffer, before)


class _WithoutDropout(TorchFunctionMode):
    """Runs every dropout function with probability zero."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs.update(zip(("attn_mask", "dropout_p", "is_causal"), args[3:6], strict=False))
            kwargs["dropout_p"] = 0.0
            args = args[:3]
        return func(*args, **kwargs)
