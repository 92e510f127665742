"""From logits and labels to per-sample loss terms: tokens, classes, values, answer spans.

Guarantee: row b of every term is made from row b of the logits, of the labels
and of the attention mask alone. Shapes that would broadcast one sample's label
over another sample's logits are errors.

Axes: B sample, T target position, C class (or vocabulary entry, or choice),
G part of a loss (the start and the end of an answer span; one for other heads).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_trainer.errors import ConfigurationError, UnsupportedOperationError

IGNORED_LABEL = -100

WAY_OUT = "Pass compute_loss_func, returning one loss a sample, of shape (B,)."


@dataclass(frozen=True, eq=False)
class LossTerms:
    """What the losses of one micro-batch are made of.

    Args:
        sums_BG: Each sample's sum over its own targets, float32 at least.
        counts_BG: How many targets each sum has; zero where there is none.
        dtype: The dtype of the logits.
        summed: Whether the head's own loss is the sum over the micro-batch rather than the mean over its targets.
    """

    sums_BG: Tensor
    counts_BG: Tensor
    dtype: torch.dtype
    summed: bool = False

    @property
    def per_sample(self) -> Tensor:
        """Each sample's mean over its own targets; 0 for a sample without any."""
        return (self.sums_BG / self.counts_BG.clamp(min=1)).mean(1)

    @property
    def batch_loss(self) -> Tensor:
        """The loss of the micro-batch as the heads themselves compute it."""
        if self.summed:
            return self.sums_BG.sum()
        return (self.sums_BG.sum(0) / self.counts_BG.sum(0)).mean()


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What a head needs besides logits and labels.

    Args:
        place: Names the model and its head in messages.
        model: The model of transformers, without wrappers.
        inputs: What it was fed.
        label_smoothing: The share of each target spread evenly over all classes.
        problem_type: The model configuration's; None where it is to be inferred from the labels.
        virtual_tokens: Positions that a PEFT prompt may add before the tokens.
        as_model: Whether to follow the model's own loss even where it couples samples, for comparing with it.
    """

    place: str
    model: Any
    inputs: Mapping[str, Any]
    label_smoothing: float
    problem_type: str | None
    virtual_tokens: int
    as_model: bool = False


def wide(logits: Tensor) -> Tensor:
    """Returns the logits in float32 at least, as losses need."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(logits_BTC: Tensor, labels_BT: Tensor, settings: HeadSettings) -> LossTerms:
    labels_BT = labels_BT.to(logits_BTC.device)
    losses = F.cross_entropy(
        wide(logits_BTC).flatten(0, 1),
        labels_BT.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
        label_smoothing=settings.label_smoothing,
    )
    counts_B1 = (labels_BT != IGNORED_LABEL).sum(1, keepdim=True)
    return LossTerms(losses.view_as(labels_BT).sum(1, keepdim=True), counts_B1, logits_BTC.dtype)


def output(outputs: Any, name: str, settings: HeadSettings) -> Tensor:
    """Returns one tensor of the model's outputs, by name.

    Raises:
        UnsupportedOperationError: If there is none.
    """
    value = outputs.get(name) if isinstance(outputs, Mapping) else None
    if not isinstance(value, Tensor):
        raise UnsupportedOperationError(
            f"{settings.place}: the forward pass returned no '{name}' tensor, which its per-sample loss "
            f"is made of. If config.return_dict is off, switch it on. {WAY_OUT}"
        )
    return value


def shape_error(what: str, expected: str, tensor: Tensor, settings: HeadSettings) -> ConfigurationError:
    """Returns the error for a tensor that does not fit the others."""
    return ConfigurationError(
        f"{settings.place}: {what} must have shape {expected}, not {tuple(tensor.shape)}. "
        f"Correct the data collator, or the loss. {WAY_OUT}"
    )


def token_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """One target a position: masked, encoder-decoder and unshifted language models, token classes."""
    logits_BTC, labels_BT = _aligned_tokens(outputs, labels, settings)
    return _cross_entropy(logits_BTC, labels_BT, settings)


def next_token_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """The next token as target: position t is compared with label t + 1."""
    logits_BTC, labels_BT = _aligned_tokens(outputs, labels, settings)
    # Shifting the labels rather than the logits keeps the large tensor whole: no copy of it is made.
    return _cross_entropy(logits_BTC, F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL), settings)


def _aligned_tokens(
    outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings
) -> tuple[Tensor, Tensor]:
    logits_BTC, labels_BT = output(outputs, "logits", settings), labels["labels"]
    if labels_BT.dim() != 2:
        raise shape_error("labels", "(B, T)", labels_BT, settings)
    if settings.virtual_tokens and logits_BTC.shape[1] == labels_BT.shape[1] + settings.virtual_tokens:
        # PEFT puts its trained prompt before the tokens. A prompt has no targets, but its last position
        # predicts the first token.
        labels_BT = F.pad(labels_BT, (settings.virtual_tokens, 0), value=IGNORED_LABEL)
    if logits_BTC.dim() != 3 or logits_BTC.shape[:2] != labels_BT.shape:
        raise shape_error("logits", f"{tuple(labels_BT.shape)} + (classes,)", logits_BTC, settings)
    return logits_BTC, labels_BT


def class_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """One label of C a sample: classes, or choices."""
    logits_BC, labels_B = output(outputs, "logits", settings), labels["labels"]
    if logits_BC.dim() != 2:
        raise shape_error("logits", "(B, classes)", logits_BC, settings)
    if labels_B.numel() != logits_BC.shape[0]:
        raise shape_error("labels", f"({logits_BC.shape[0]},)", labels_B, settings)
    return _cross_entropy(logits_BC.unsqueeze(1), labels_B.reshape(-1, 1), settings)


def _elementwise(
    loss: Callable[..., Tensor], logits_BC: Tensor, labels: Tensor, settings: HeadSettings
) -> LossTerms:
    if settings.label_smoothing:
        raise ConfigurationError(
            f"{settings.place}: label smoothing spreads the label over classes, and this loss has none. "
            "Set label_smoothing_factor to 0."
        )
    # Unequal shapes would broadcast, and so mix every sample's label into every sample's loss.
    if labels.numel() != logits_BC.numel() or labels.shape[0] != logits_BC.shape[0]:
        raise shape_error("labels", str(tuple(logits_BC.shape)), labels, settings)
    labels_BC = labels.reshape(logits_BC.shape).to(logits_BC.device)
    wide_BC = wide(logits_BC)
    sums_B1 = loss(wide_BC, labels_BC.to(wide_BC.dtype), reduction="none").sum(1, keepdim=True)
    return LossTerms(sums_B1, torch.full_like(sums_B1, logits_BC.shape[1]), logits_BC.dtype)


def sequence_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """Single-label, multi-label or regression, told apart as ``transformers`` does."""
    logits_BC = output(outputs, "logits", settings)
    if logits_BC.dim() != 2:
        raise shape_error("logits", "(B, classes)", logits_BC, settings)
    match settings.problem_type or _inferred_problem_type(logits_BC, labels["labels"]):
        case "regression":
            return _elementwise(F.mse_loss, logits_BC, labels["labels"], settings)
        case "multi_label_classification":
            return _elementwise(F.binary_cross_entropy_with_logits, logits_BC, labels["labels"], settings)
        case "single_label_classification":
            return class_terms(outputs, labels, settings)
        case other:
            raise ConfigurationError(
                f"{settings.place}: config.problem_type is '{other}'. Set it to 'regression', "
                "'single_label_classification' or 'multi_label_classification'."
            )


def _inferred_problem_type(logits_BC: Tensor, labels: Tensor) -> str:
    if logits_BC.shape[1] == 1:
        return "regression"
    if labels.dtype in (torch.int64, torch.int32):
        return "single_label_classification"
    return "multi_label_classification"


def span_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """The start and the end of an answer, half of the loss each.

    The softmax runs over the sample's own tokens, those that the attention mask
    keeps: over padding as well, as in transformers, a sample's gradient would
    depend on how long its longest neighbour is. A position that is padding, or
    lies outside, counts as no target.
    """
    parts = []
    for part in ("start", "end"):
        logits_BT, positions = output(outputs, f"{part}_logits", settings), labels[f"{part}_positions"]
        if positions.numel() != logits_BT.shape[0]:
            raise shape_error(f"{part}_positions", f"({logits_BT.shape[0]},)", positions, settings)
        # As transformers does: before the first position means the first, after the last is ignored.
        positions_B1 = positions.reshape(-1, 1).clamp(min=0).to(logits_BT.device)
        targeted_B1 = positions_B1 < logits_BT.shape[1]
        kept_BT = _own_tokens(logits_BT, settings)
        if kept_BT is not None:
            targeted_B1 &= kept_BT.gather(1, positions_B1.clamp(max=logits_BT.shape[1] - 1))
            # Not minus infinity: a sample without any token would be NaN on the way to its 0.
            logits_BT = logits_BT.masked_fill(~kept_BT, torch.finfo(logits_BT.dtype).min)
        positions_B1 = positions_B1.where(targeted_B1, IGNORED_LABEL)
        parts.append(_cross_entropy(logits_BT.unsqueeze(1), positions_B1, settings))
    return LossTerms(
        torch.cat([p.sums_BG for p in parts], 1), torch.cat([p.counts_BG for p in parts], 1), parts[0].dtype
    )


def _own_tokens(logits_BT: Tensor, settings: HeadSettings) -> Tensor | None:
    """Which positions are the sample's own, not padding; None where no mask tells, or the mask covers others."""
    mask_BT = settings.inputs.get("attention_mask")
    if settings.as_model or not isinstance(mask_BT, Tensor) or mask_BT.shape != logits_BT.shape:
        return None
    return mask_BT.to(logits_BT.device) != 0
