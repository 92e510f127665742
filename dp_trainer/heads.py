"""The table of heads: what each kind of head is trained to do.

One row of :data:`HEADS` is one kind of head. Adding one: write how its outputs
and labels become :class:`~dp_trainer.terms.LossTerms`, and add a row; the tests
run on every row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dp_trainer.ctc import ctc_terms
from dp_trainer.terms import (
    HeadSettings,
    LossTerms,
    class_terms,
    next_token_terms,
    sequence_terms,
    span_terms,
    token_terms,
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
        decodes: Whether a decoder reads the labels, shifted right. Models of such a table that have no encoder
            (a language model that also hears) are causal language models.
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

CAUSAL_LM = Head(name="causal LM", table="CAUSAL_LM", terms=next_token_terms)

# A class may be in several tables of transformers: the first row that has it wins.
HEADS = (
    Head(name="unshifted causal LM", table=None, classes=tuple(_UNSHIFTED.split()), terms=token_terms),
    CAUSAL_LM,
    Head(name="seq2seq LM", table="SEQ_TO_SEQ_CAUSAL_LM", terms=token_terms, decodes=True),
    Head(name="speech seq2seq", table="SPEECH_SEQ_2_SEQ", terms=token_terms, decodes=True),
    Head(name="masked LM", table="MASKED_LM", terms=token_terms),
    Head(name="token classification", table="TOKEN_CLASSIFICATION", terms=token_terms),
    Head(name="sequence classification", table="SEQUENCE_CLASSIFICATION", terms=sequence_terms),
    Head(name="image classification", table="IMAGE_CLASSIFICATION", terms=sequence_terms),
    Head(name="video classification", table="VIDEO_CLASSIFICATION", terms=sequence_terms),
    Head(name="CTC", table="CTC", terms=ctc_terms, smoothable=False),
    Head(name="audio classification", table="AUDIO_CLASSIFICATION", terms=sequence_terms),
    Head(name="multiple choice", table="MULTIPLE_CHOICE", terms=class_terms),
    Head(
        name="question answering",
        table="QUESTION_ANSWERING",
        terms=span_terms,
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
