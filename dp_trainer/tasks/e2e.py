"""E2E: write a restaurant's description from its attributes; ships with the package.

One row is a meaning representation and one human reference. The input is

    meaning representation, separator, reference, end of sequence

and the loss counts the reference and the end alone: labels are −100 elsewhere.
Source: Novikova, Dusek, Rieser 2017, see NOTICE.

Axes: B sample, T position, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.base import (
    BundledData,
    Dataset,
    PreparedSplit,
    Task,
    Tokenizer,
    Writing,
    refuse_missing_texts,
)

SEPARATOR = " ||"
IGNORED = -100


def encode_prompts(meanings: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the tokens that stand before each reference: what a trained model continues."""
    sources = tokenizer([meaning + SEPARATOR for meaning in meanings], add_special_tokens=False)
    ids: list[list[int]] = sources["input_ids"]
    return ids


def encode_pairs(
    meanings: list[str], references: list[str], tokenizer: Tokenizer
) -> dict[str, list[list[int]]]:
    """Returns input ids, attention mask and labels of each pair, uncut.

    The two sides are tokenised apart, so that the border of the labels falls on
    a token border whatever the tokenizer merges.
    """
    sources = encode_prompts(meanings, tokenizer)
    # The leading space makes the reference's first word the token it is inside a text.
    targets = tokenizer([" " + reference.strip() for reference in references], add_special_tokens=False)[
        "input_ids"
    ]
    targets = [[*target, tokenizer.eos_token_id] for target in targets]
    pairs = list(zip(sources, targets, strict=True))
    return {
        "input_ids": [source + target for source, target in pairs],
        "attention_mask": [[1] * (len(source) + len(target)) for source, target in pairs],
        "labels": [[IGNORED] * len(source) + target for source, target in pairs],
    }


def prepare(rows: Dataset, tokenizer: Tokenizer, max_length: int) -> PreparedSplit:
    """Encodes every row and drops those longer than ``max_length`` tokens."""
    if tokenizer.eos_token_id is None:
        raise ConfigurationError(
            f"task 'e2e': {type(tokenizer).__name__} has no end-of-sequence token, "
            "so the model could not learn to stop. Use a tokenizer with an eos_token."
        )

    read = ["meaning_representation", "human_reference"]
    refuse_missing_texts(rows, tuple(read))

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        return encode_pairs(batch["meaning_representation"], batch["human_reference"], tokenizer)

    encoded = rows.map(encode, batched=True, remove_columns=read, desc="Tokenising e2e")
    # In batches, so that a long row costs a comparison rather than a decoded row.
    kept = encoded.filter(
        lambda batch: [len(ids) <= max_length for ids in batch["input_ids"]],
        batched=True,
        desc=f"Dropping rows longer than {max_length} tokens",
    )
    return PreparedSplit(dataset=kept, dropped=len(encoded) - len(kept))


def token_losses(logits: Any, labels_BT: Tensor) -> Tensor:
    """Reduces logits to each sample's summed loss and number of target tokens, shape (B, 2).

    Keeping the logits of a whole split would take N·T·V floats (tens of gigabytes
    for GPT-2); two numbers a sample give the same perplexity exactly.
    """
    logits_BTV = logits[0] if isinstance(logits, tuple) else logits
    # Position t predicts token t + 1; the last one has no target.
    targets_BT = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    losses_BT = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none", ignore_index=IGNORED
    ).view_as(targets_BT)
    return torch.stack([losses_BT.sum(1), (targets_BT != IGNORED).sum(1).to(losses_BT.dtype)], dim=1)


def perplexity(prediction: Any) -> dict[str, float]:
    """Returns the mean loss over all target tokens of the split, in nats, and its exponential.

    Args:
        prediction: The Trainer's ``EvalPrediction`` whose predictions are (N, 2), from :func:`token_losses`.
    """
    losses, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    mean = losses / tokens
    # exp overflows beyond 709; an untrained or diverged model is then plainly infinite.
    return {"token_loss": float(mean), "perplexity": math.exp(mean) if mean < 700 else math.inf}


E2E = Task(
    name="e2e",
    source=BundledData(folder="e2e_nlg"),
    further_splits=("test",),
    columns=("meaning_representation", "human_reference"),
    labels=None,
    auto_model="AutoModelForCausalLM",
    max_length=100,
    prepare=prepare,
    collator=lambda tokenizer: DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    compute_metrics=perplexity,
    preprocess_logits=token_losses,
    metric="perplexity",
    metric_label="perplexity of the reference tokens",
    writing=Writing(
        prompt_column="meaning_representation", reference_column="human_reference", encode=encode_prompts
    ),
)
