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
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dp_trainer.batches import select, split_micro_batch
from dp_trainer.errors import CertificateError
from dp_trainer.gradients.independence import check_independence, repeatable
from dp_trainer.gradients.sharding import is_sharded, local, put_to_rest, squared_length
from dp_trainer.gradients.strategies import (
    ClippedGradientSum,
    MicroBatch,
    PerSampleLoss,
    unchecked_sum,
)
from dp_trainer.privacy.clipping import ClippingFunction, FlatClipping

# Largest relative difference that rounding explains, by the coarsest dtype in the computation.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# Norms and sums come from the same tensors, so one contribution may exceed the sensitivity by float32
# rounding alone, whatever the model's dtype.
LARGEST_EXCESS = 1e-4
# How far weights are moved for the second comparison, relative to their spread.
_PERTURBATION = 0.02
# A parameter with less than this share of all contributions is compared as if it had this share.
_SMALLEST_SHARE = 1e-2
_PADDED_COLUMNS = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "labels",
    "special_tokens_mask",
    "bbox",
    # Sound, in step with its mask: a normalization over time reads padding, and so a neighbour's length.
    "input_values",
    "input_features",
}
# Targets that are positions in the text.
_POSITION_COLUMNS = {"start_positions", "end_positions"}


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was measured on real samples before the first release.

    Args:
        samples: Number of samples compared.
        strategy: The strategy that was checked.
        clipping_norm: The bound used for comparing sums, near the samples' median norm.
        norm_error: Largest relative difference of a norm from the reference.
        sum_error: Largest difference of a parameter's clipped sum from the reference, relative to the samples'
            contributions to that parameter.
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
        return max(LARGEST_EXCESS, 4 * (self.largest_contribution - 1))

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
    exceeds the sensitivity; all within the tolerance of the dtype, at the given
    weights and at weights moved a little; and no recorded gradient holds another
    sample's. Dropout is off meanwhile. The model's weights, mode, gradients, buffers
    and the global generators are left as they were.

    Args:
        model: The model, in the mode that training will use.
        micro_batch: Two samples or more, best of unequal lengths.
        per_sample_loss: As in ``clipped_gradient_sum``.
        clipping: The run's clipping function.
        strategy: The strategy to check. Of ``"automatic"``, the one of its ways that is not plain autograd
            on each sample: ``"book_keeping"``.
        computation_dtype: The dtype of autocast inside ``per_sample_loss``, if any. Samples whose gradient is
            NaN or infinite are not compared, as they are never released.

    Raises:
        CertificateError: If samples influence each other, a norm or the sum is
            inexact, a buffer is updated from samples, or a contribution is too large.
    """
    alone = [without_padding(sample) for sample in split_micro_batch(micro_batch)]
    if len(alone) < 2:
        raise CertificateError(
            f"{len(alone)} sample is too few to see whether samples influence each other. Take at least 2."
        )
    if strategy == "automatic":
        # Long samples, or one alone, may take the reference's way, and show nothing of what shorter ones take.
        strategy = "book_keeping"
    put_to_rest(model)
    tolerance = _tolerance(model, computation_dtype)
    settings = (per_sample_loss, clipping, strategy, tolerance)
    with repeatable(model):
        given = _compare(model, micro_batch, alone, *settings)
        # Weights that start at zero hide what lies behind them: an adapter, a new head, a gate.
        with _perturbed(model):
            moved = _compare(model, micro_batch, alone, *settings)
    return dataclasses.replace(
        given,
        norm_error=max(given.norm_error, moved.norm_error),
        sum_error=max(given.sum_error, moved.sum_error),
        largest_contribution=max(given.largest_contribution, moved.largest_contribution),
    )


def _compare(
    model: nn.Module,
    micro_batch: MicroBatch,
    alone: Sequence[MicroBatch],
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    strategy: str,
    tolerance: float,
) -> Certificate:
    """The comparison at the model's present weights."""
    norms_B = _run(model, alone, per_sample_loss, FlatClipping(1.0), "loop").norms
    finite = torch.isfinite(norms_B).nonzero().flatten().tolist()
    if not finite or not norms_B[finite].any():
        raise CertificateError(
            f"All {len(alone)} samples looked at have gradients of {_listed(norms_B)}, so nothing can be compared. "
            "Check the data, the loss, the trainable parameters, and bf16 against float32."
        )
    micro_batch, alone, norms_B = select(micro_batch, finite), [alone[i] for i in finite], norms_B[finite]
    if strategy != "loop":
        check_independence(model, micro_batch, per_sample_loss)
    flat = FlatClipping(max(float(norms_B.median()), 1e-9))
    engine = _run(model, [micro_batch], per_sample_loss, flat, strategy)
    worst, sum_error = _sum_error(model, alone, per_sample_loss, flat, engine)
    norm_error = float(((engine.norms - norms_B).abs() / norms_B.clamp(min=1e-9)).max())
    # Asked so that NaN does not pass.
    if not (norm_error <= tolerance and sum_error <= tolerance):
        by_itself = torch.cat([_run(model, [s], per_sample_loss, flat, strategy).norms for s in alone])
        raise _disagreement(worst, engine.norms, by_itself, norms_B, tolerance)
    singles = (_run(model, [s], per_sample_loss, clipping, strategy).gradients for s in alone)
    largest = max(_length(gradients) for gradients in singles) / clipping.sensitivity
    if not largest <= 1 + LARGEST_EXCESS:
        raise CertificateError(
            f"One sample contributes {largest:.5f} times the sensitivity with strategy={strategy!r}. "
            "This breaks the privacy bound: set strategy='loop' and report the model."
        )
    return Certificate(
        samples=len(alone),
        strategy=strategy,
        clipping_norm=flat.clipping_norm,
        norm_error=norm_error,
        sum_error=sum_error,
        largest_contribution=largest,
        tolerance=tolerance,
    )


def _sum_error(
    model: nn.Module,
    alone: Sequence[MicroBatch],
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    engine: ClippedGradientSum,
) -> tuple[str, float]:
    """The parameter whose clipped sum is furthest from the reference, and its relative error.

    Relative to the samples' contributions to that parameter, so that a small
    share of the whole gradient does not hide.
    """
    expected = {name: torch.zeros_like(total) for name, total in engine.gradients.items()}
    sizes = dict.fromkeys(expected, 0.0)
    for sample in alone:
        for name, gradient in _run(model, [sample], per_sample_loss, clipping, "loop").gradients.items():
            expected[name] += gradient
            sizes[name] += _size(gradient)
    floor = _SMALLEST_SHARE * sum(sizes.values())
    errors = {
        name: _size(engine.gradients[name] - expected[name]) / (sizes[name] + floor) for name in expected
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return worst, errors[worst]


@contextlib.contextmanager
def _perturbed(model: nn.Module) -> Iterator[None]:
    """While inside, trainable weights are moved a little, the same way each time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in parameters]
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in (p for p in map(local, parameters) if p.numel()):
                spread = parameter.float().std(correction=0).to(parameter.dtype)
                parameter.add_(_PERTURBATION * (spread + _PERTURBATION) * torch.randn_like(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.copy_(values)


def without_padding(sample: MicroBatch) -> dict[str, Any]:
    """One sample's micro-batch, cut to the columns that its attention mask keeps.

    Targets that are positions are counted anew. A sample with columns of unknown
    meaning, with targets under its padding, or with sound that runs in step with
    its text, is returned whole.
    """
    mask = sample.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.any():
        return dict(sample)
    kept = mask[0].bool()
    columns = {n: v for n, v in sample.items() if isinstance(v, Tensor) and v.shape[1:2] == mask.shape[1:]}
    targets = columns.get("labels")
    positions = {n: v.long() for n, v in sample.items() if n in _POSITION_COLUMNS and isinstance(v, Tensor)}
    if (
        not columns.keys() <= _PADDED_COLUMNS
        or (targets is not None and (targets[:, ~kept] != -100).any())
        or not all(0 <= int(v) < len(kept) and bool(kept[int(v)]) for v in positions.values())
        or _sound_in_step(sample, len(kept))
    ):
        return dict(sample)
    cut = {name: value[:, kept] for name, value in columns.items()}
    anew = {name: kept.cumsum(0).to(value)[value] - 1 for name, value in positions.items()}
    return {**sample, **cut, **anew}


def _sound_in_step(sample: MicroBatch, length: int) -> bool:
    """Whether each token seems to have as many frames of sound as any other, so that both would have to be cut.

    Sound with a mask of its own has a length of its own.
    """
    sound = sample.get("input_features")
    has_mask = any(name in sample for name in ("input_features_mask", "feature_attention_mask"))
    return isinstance(sound, Tensor) and not has_mask and sound.shape[-1] % length == 0


def _run(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    per_sample_loss: PerSampleLoss,
    clipping: ClippingFunction,
    strategy: str,
) -> ClippedGradientSum:
    torch.manual_seed(0)
    result = unchecked_sum(
        model, micro_batches, per_sample_loss=per_sample_loss, clipping=clipping, strategy=strategy
    )
    if not is_sharded(model) or strategy in ("loop", "direct"):
        return result
    # All ranks have the same samples here, and the sums of all were added.
    shares = {name: total / dist.get_world_size() for name, total in result.gradients.items()}
    return dataclasses.replace(result, gradients=shares)


def _disagreement(
    worst: str, together_B: Tensor, by_itself_B: Tensor, norms_B: Tensor, tolerance: float
) -> CertificateError:
    """Tells coupled samples from an inexact rule."""
    norms = f"norms {_listed(together_B)} together, {_listed(norms_B)} one at a time"
    if float(((by_itself_B - norms_B).abs() / norms_B.clamp(min=1e-9)).max()) <= tolerance:
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
    return math.hypot(*(_size(gradient) for gradient in gradients.values()))


def _size(tensor: Tensor) -> float:
    return float(squared_length(tensor).sqrt())


def _tolerance(model: nn.Module, computation_dtype: torch.dtype | None) -> float:
    dtypes = {p.dtype for p in model.parameters()} | ({computation_dtype} if computation_dtype else set())
    return max(_TOLERANCES.get(dtype, _TOLERANCES[torch.float32]) for dtype in dtypes)
