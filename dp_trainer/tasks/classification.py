"""Builds tasks that one ordinary sequence-classification head solves.

Shapes: logits (N, K) for N samples and K classes; label ids 0 … K−1.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from transformers import DataCollatorWithPadding

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.base import (
    BundledData,
    Dataset,
    HubData,
    PreparedSplit,
    Task,
    Tokenizer,
    refuse_missing_texts,
)


def sequence_classification(
    *,
    name: str,
    source: BundledData | HubData,
    text_columns: tuple[str, ...],
    labels: tuple[str, ...],
    max_length: int,
    label_column: str = "label",
    validation_split: str = "validation",
    further_splits: tuple[str, ...] = (),
) -> Task:
    """Describes a task that assigns one of ``labels`` to a text or a pair of texts.

    Args:
        name: The task's name.
        source: Where its rows lie unless the user says otherwise.
        text_columns: One column, or two that the tokenizer joins.
        labels: Names of the classes, in the order of their ids.
        max_length: Longer inputs are cut to so many tokens.
        label_column: Column of the integer class ids.
        validation_split: Name of the split to evaluate on.
        further_splits: Splits evaluated after training where the data has them.
    """

    def prepare(rows: Dataset, tokenizer: Tokenizer, length: int) -> PreparedSplit:
        _check_rows(rows, text_columns=text_columns, label_column=label_column, classes=len(labels))

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [batch[column] for column in text_columns]
            return {**tokenizer(*texts, truncation=True, max_length=length), "labels": batch[label_column]}

        dataset = rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"Tokenising {name}")
        return PreparedSplit(dataset=dataset)

    return Task(
        name=name,
        source=source,
        validation_split=validation_split,
        further_splits=further_splits,
        columns=(*text_columns, label_column),
        labels=labels,
        auto_model="AutoModelForSequenceClassification",
        max_length=max_length,
        prepare=prepare,
        collator=lambda tokenizer: DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        metric="accuracy",
        metric_label="accuracy",
        baseline=majority_share,
    )


def accuracy(prediction: Any) -> dict[str, float]:
    """Returns the share of samples whose largest logit is at the label.

    Args:
        prediction: The Trainer's ``EvalPrediction``: logits (N, K), labels (N,).
    """
    # Some models return (logits, hidden states, …).
    logits = (
        prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    )
    return {"accuracy": float((np.asarray(logits).argmax(axis=-1) == prediction.label_ids).mean())}


def majority_share(dataset: Dataset) -> float:
    """Returns the accuracy of the best constant answer on this split."""
    labels = list(dataset["labels"])
    return Counter(labels).most_common(1)[0][1] / len(labels)


def _check_rows(rows: Dataset, *, text_columns: tuple[str, ...], label_column: str, classes: int) -> None:
    refuse_missing_texts(rows, text_columns)
    for i, label in enumerate(rows[label_column]):
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < classes:
            raise ConfigurationError(
                f"row {i}, column '{label_column}': {label!r} is not a class id from 0 to {classes - 1}. "
                "Give integer ids; leave unlabelled rows out."
            )
