"""What each kind of head is trained to do: from logits and labels to per-sample loss terms.

Guarantee: row b of every term is made from row b of the logits and of the
labels alone. Shapes that would broadcast one sample's label over another
sample's logits are errors.

One row of :data:`HEADS` is one kind of head. Adding one: write how its outputs
and labels become :class:`LossTerms`, and add a row; the tests run on every row.

Axes: B sample, T target position, C class (or vocabulary entry, or choice),
G part of a loss (the start and the end of an answer span; one for other heads).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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
    """

    sums_BG: Tensor
    counts_BG: Tensor
    dtype: torch.dtype

    @property
    def per_sample(self) -> Tensor:
        """Each sample's mean over its own targets; 0 for a sample without any."""
        return (self.sums_BG / self.counts_BG.clamp(min=1)).mean(1)

    @property
    def batch_mean(self) -> Tensor:
        """The mean over all targets of the micro-batch, as the heads themselves compute it."""
        return (self.sums_BG.sum(0) / self.counts_BG.sum(0)).mean()


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What a head needs besides logits and labels.

    Args:
        place: Names the model and its head in messages.
        label_smoothing: The share of each target spread evenly over all classes.
        problem_type: The model configuration's; None where it is to be inferred from the labels.
        virtual_tokens: Positions that a PEFT prompt may add before the tokens.
    """

    place: str
    label_smoothing: float
    problem_type: str | None
    virtual_tokens: int


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(logits_BTC: Tensor, labels_BT: Tensor, settings: HeadSettings) -> LossTerms:
    labels_BT = labels_BT.to(logits_BTC.device)
    losses = F.cross_entropy(
        _wide(logits_BTC).flatten(0, 1),
        labels_BT.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
        label_smoothing=settings.label_smoothing,
    )
    counts_B1 = (labels_BT != IGNORED_LABEL).sum(1, keepdim=True)
    return LossTerms(losses.view_as(labels_BT).sum(1, keepdim=True), counts_B1, logits_BTC.dtype)


def _output(outputs: Any, name: str, settings: HeadSettings) -> Tensor:
    value = outputs.get(name) if isinstance(outputs, Mapping) else None
    if not isinstance(value, Tensor):
        raise UnsupportedOperationError(
            f"{settings.place}: the forward pass returned no '{name}' tensor, which its per-sample loss "
            f"is made of. If config.return_dict is off, switch it on. {WAY_OUT}"
        )
    return value


def _shape_error(what: str, expected: str, tensor: Tensor, settings: HeadSettings) -> ConfigurationError:
    return ConfigurationError(
        f"{settings.place}: {what} must have shape {expected}, not {tuple(tensor.shape)}. "
        f"Correct the data collator, or the loss. {WAY_OUT}"
    )


def _token_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """One target a position: masked, encoder-decoder and unshifted language models, token classes."""
    logits_BTC, labels_BT = _aligned_tokens(outputs, labels, settings)
    return _cross_entropy(logits_BTC, labels_BT, settings)


def _next_token_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """The next token as target: position t is compared with label t + 1."""
    logits_BTC, labels_BT = _aligned_tokens(outputs, labels, settings)
    # Shifting the labels rather than the logits keeps the large tensor whole: no copy of it is made.
    return _cross_entropy(logits_BTC, F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL), settings)


def _aligned_tokens(
    outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings
) -> tuple[Tensor, Tensor]:
    logits_BTC, labels_BT = _output(outputs, "logits", settings), labels["labels"]
    if labels_BT.dim() != 2:
        raise _shape_error("labels", "(B, T)", labels_BT, settings)
    if settings.virtual_tokens and logits_BTC.shape[1] == labels_BT.shape[1] + settings.virtual_tokens:
        # PEFT puts its trained prompt before the tokens. A prompt has no targets, but its last position
        # predicts the first token.
        labels_BT = F.pad(labels_BT, (settings.virtual_tokens, 0), value=IGNORED_LABEL)
    if logits_BTC.dim() != 3 or logits_BTC.shape[:2] != labels_BT.shape:
        raise _shape_error("logits", f"{tuple(labels_BT.shape)} + (classes,)", logits_BTC, settings)
    return logits_BTC, labels_BT


def _class_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """One label of C a sample: classes, or choices."""
    logits_BC, labels_B = _output(outputs, "logits", settings), labels["labels"]
    if logits_BC.dim() != 2:
        raise _shape_error("logits", "(B, classes)", logits_BC, settings)
    if labels_B.numel() != logits_BC.shape[0]:
        raise _shape_error("labels", f"({logits_BC.shape[0]},)", labels_B, settings)
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
        raise _shape_error("labels", str(tuple(logits_BC.shape)), labels, settings)
    labels_BC = labels.reshape(logits_BC.shape).to(logits_BC.device)
    wide_BC = _wide(logits_BC)
    sums_B1 = loss(wide_BC, labels_BC.to(wide_BC.dtype), reduction="none").sum(1, keepdim=True)
    return LossTerms(sums_B1, torch.full_like(sums_B1, logits_BC.shape[1]), logits_BC.dtype)


def _sequence_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """Single-label, multi-label or regression, told apart as ``transformers`` does."""
    logits_BC = _output(outputs, "logits", settings)
    if logits_BC.dim() != 2:
        raise _shape_error("logits", "(B, classes)", logits_BC, settings)
    match settings.problem_type or _inferred_problem_type(logits_BC, labels["labels"]):
        case "regression":
            return _elementwise(F.mse_loss, logits_BC, labels["labels"], settings)
        case "multi_label_classification":
            return _elementwise(F.binary_cross_entropy_with_logits, logits_BC, labels["labels"], settings)
        case "single_label_classification":
            return _class_terms(outputs, labels, settings)
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


def _span_terms(outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
    """The start and the end of an answer, half of the loss each; out of range counts as no target."""
    parts = []
    for part in ("start", "end"):
        logits_BT, positions = _output(outputs, f"{part}_logits", settings), labels[f"{part}_positions"]
        if positions.numel() != logits_BT.shape[0]:
            raise _shape_error(f"{part}_positions", f"({logits_BT.shape[0]},)", positions, settings)
        # As transformers does: before the first position means the first, after the last is ignored.
        positions_B1 = positions.reshape(-1, 1).clamp(min=0)
        positions_B1 = positions_B1.where(positions_B1 < logits_BT.shape[1], IGNORED_LABEL)
        parts.append(_cross_entropy(logits_BT.unsqueeze(1), positions_B1, settings))
    return LossTerms(
        torch.cat([p.sums_BG for p in parts], 1), torch.cat([p.counts_BG for p in parts], 1), parts[0].dtype
    )


class TermsOf(Protocol):
    """Makes loss terms from a forward pass without labels, and the labels."""

    def __call__(self, outputs: Any, labels: Mapping[str, Tensor], settings: HeadSettings) -> LossTerms:
        """Returns terms whose row b comes from row b of ``outputs`` and ``labels``.

        Raises:
            ConfigurationError: If the labels do not fit the outputs.
            UnsupportedOperationError: If an output that is needed is missing.
        """


@dataclass(frozen=True, kw_only=True)
class Head:
    """One row of the table of heads.

    Args:
        name: What the head is called in messages.
        table: Which of transformers' tables ``MODEL_FOR_…_MAPPING_NAMES`` lists its classes; None: none.
        terms: Makes loss terms from the model's outputs and the labels.
        labels: The columns that hold the targets.
        classes: Names of model classes beside those of the table.
        decodes: Whether a decoder reads the labels, shifted right.
        smoothable: Whether label smoothing has a meaning (see also the problem types).
    """

    name: str
    table: str | None
    terms: TermsOf
    labels: tuple[str, ...] = ("labels",)
    classes: tuple[str, ...] = ()
    decodes: bool = False
    smoothable: bool = True


# The own loss of these compares position t with label t, so their labels must come shifted. They are
# decoders cut out of encoder-decoder models, and permutation models.
_UNSHIFTED = (
    "BartForCausalLM BigBirdPegasusForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM "
    "CpmAntForCausalLM MarianForCausalLM MBartForCausalLM MvpForCausalLM PegasusForCausalLM "
    "PLBartForCausalLM TrOCRForCausalLM WhisperForCausalLM XLMWithLMHeadModel XLNetLMHeadModel"
)

# A class may be in several tables of transformers: the first row that has it wins.
HEADS = (
    Head(name="unshifted causal LM", table=None, classes=tuple(_UNSHIFTED.split()), terms=_token_terms),
    Head(name="causal LM", table="CAUSAL_LM", terms=_next_token_terms),
    Head(name="seq2seq LM", table="SEQ_TO_SEQ_CAUSAL_LM", terms=_token_terms, decodes=True),
    Head(name="speech seq2seq", table="SPEECH_SEQ_2_SEQ", terms=_token_terms, decodes=True),
    Head(name="masked LM", table="MASKED_LM", terms=_token_terms),
    Head(name="token classification", table="TOKEN_CLASSIFICATION", terms=_token_terms),
    Head(name="sequence classification", table="SEQUENCE_CLASSIFICATION", terms=_sequence_terms),
    Head(name="image classification", table="IMAGE_CLASSIFICATION", terms=_sequence_terms),
    Head(name="video classification", table="VIDEO_CLASSIFICATION", terms=_sequence_terms),
    Head(name="audio classification", table="AUDIO_CLASSIFICATION", terms=_sequence_terms),
    Head(name="multiple choice", table="MULTIPLE_CHOICE", terms=_class_terms),
    Head(
        name="question answering",
        table="QUESTION_ANSWERING",
        terms=_span_terms,
        labels=("start_positions", "end_positions"),
        # transformers smooths only what is called "labels".
        smoothable=False,
    ),
)


@functools.cache
def head_of_class() -> Mapping[str, Head]:
    """Maps names of model classes to heads."""
    from transformers.models.auto import modeling_auto  # a heavy import, needed only once a model exists

    heads: dict[str, Head] = {}
    for head in HEADS:
        listed = list(head.classes)
        if head.table is not None:
            for names in getattr(modeling_auto, f"MODEL_FOR_{head.table}_MAPPING_NAMES").values():
                listed.extend([names] if isinstance(names, str) else names)
        for name in listed:
            heads.setdefault(name, head)
    return heads
