"""Connectionist temporal classification: the loss of a transcript whose alignment with the sound is unknown.

Guarantee: row b of the terms is made from row b of the logits, of the labels and
of the attention mask alone. Frames of padding do not count.

Axes: B sample, F frame of the logits, T label position, C vocabulary entry, N target of any sample.

Source: Graves et al. 2006.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_trainer.errors import ConfigurationError, UnsupportedOperationError
from dp_trainer.terms import IGNORED_LABEL, WAY_OUT, HeadSettings, LossTerms, output, shape_error, wide


def ctc_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """One target a sample, its whole transcript.

    Its loss is divided by the transcript's length where the model's configuration
    says ``ctc_loss_reduction="mean"``, which is then each sample's own mean. An
    empty transcript is a target too: silence.
    """
    logits_BFC, labels_BT = output(outputs, "logits", settings), labels["labels"]
    if labels_BT.dim() != 2:
        raise shape_error("labels", "(B, T)", labels_BT, settings)
    if logits_BFC.dim() != 3 or len(logits_BFC) != len(labels_BT):
        raise shape_error("logits", f"({len(labels_BT)}, frames, classes)", logits_BFC, settings)
    config, classes = settings.model.config, logits_BFC.shape[2]
    blank = config.pad_token_id
    if blank is None or not 0 <= blank < classes:
        raise ConfigurationError(
            f"{settings.place}: config.pad_token_id, the blank, is {blank}. Set it to a class in [0, {classes})."
        )
    # The blank is never a target: transformers leaves it out too, for labels that were padded with it.
    targets_BT = (labels_BT != IGNORED_LABEL) & (labels_BT != blank)
    targets_N = labels_BT[targets_BT].to(logits_BFC.device)
    lengths_B = targets_BT.sum(1).to(logits_BFC.device)
    # The kernel reads beyond its tables instead of checking.
    if len(targets_N) and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < classes:
        raise ConfigurationError(
            f"{settings.place}: labels must lie in [0, {classes}), or be {IGNORED_LABEL} for padding; "
            f"they reach from {int(targets_N.min())} to {int(targets_N.max())}. Use the model's own tokenizer."
        )
    losses_B = F.ctc_loss(
        wide(logits_BFC).log_softmax(2).transpose(0, 1),
        targets_N,
        _frame_counts(logits_BFC, settings),
        lengths_B,
        blank=blank,
        reduction="none",
        zero_infinity=config.ctc_zero_infinity,
    )
    summed = _is_summed(config.ctc_loss_reduction, settings)
    sums_B1 = (losses_B if summed else losses_B / lengths_B.clamp(min=1)).unsqueeze(1)
    return LossTerms(sums_B1, torch.ones_like(sums_B1), logits_BFC.dtype, summed)


def _is_summed(reduction: str, settings: HeadSettings) -> bool:
    if reduction not in ("sum", "mean"):
        raise ConfigurationError(
            f"{settings.place}: config.ctc_loss_reduction is '{reduction}'. Set it to 'mean' or 'sum'."
        )
    return reduction == "sum"


def _frame_counts(logits_BFC: Tensor, settings: HeadSettings) -> Tensor:
    """How many frames of the logits are each sample's own, (B,), as the model itself reckons."""
    size, frames, _ = logits_BFC.shape
    mask = settings.inputs.get("attention_mask")
    if mask is None:
        return torch.full((size,), frames, device=logits_BFC.device)
    model = settings.model
    if hasattr(model, "_get_output_attention_mask"):
        counts_B = model._get_output_attention_mask(mask, target_length=frames).sum(1)
    elif hasattr(model, "_get_feat_extract_output_lengths"):
        counts_B = model._get_feat_extract_output_lengths(mask.sum(1))
    else:
        raise UnsupportedOperationError(
            f"{settings.place}: the model does not say how many frames of its logits belong to a masked input. "
            f"{WAY_OUT}"
        )
    counts_B = torch.as_tensor(counts_B, device=logits_BFC.device, dtype=torch.long)
    if not 0 < int(counts_B.min()) <= int(counts_B.max()) <= frames:
        raise ConfigurationError(
            f"{settings.place}: {counts_B.tolist()} frames of {frames} come out of the samples' lengths. Leave out "
            "recordings that are shorter than one frame, and check the attention mask."
        )
    return counts_B
