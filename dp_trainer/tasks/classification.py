"""Builds tasks that assign a class to a text: by a classification head, or by label words at a mask.

Shapes: logits (N, K) for N samples and K classes; label ids 0 … K−1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from transformers import DataCollatorWithPadding

from dp_trainer.tasks.base import (
    BundledData,
    Dataset,
    HubData,
    PreparedSplit,
    Task,
    Tokenizer,
    refuse_missing_texts,
    refuse_wrong_labels,
)
from dp_trainer.tasks.infilling import Infilling, label_word_ids, prepare_infilling
from dp_trainer.tasks.label_words import answer_at_mask, class_losses


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
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    infilling: Infilling | None = None,
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
        compute_metrics: What is measured, ``accuracy`` among it; accuracy alone if left out.
        infilling: The template and words for solving it by label words, if it can be.
    """

    def prepare(rows: Dataset, tokenizer: Tokenizer, length: int) -> PreparedSplit:
        refuse_missing_texts(rows, text_columns)
        refuse_wrong_labels(rows, label_column, labels)

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [batch[column] for column in text_columns]
            return {**tokenizer(*texts, truncation=True, max_length=length), "labels": batch[label_column]}

        read = [*text_columns, label_column]
        dataset = rows.map(encode, batched=True, remove_columns=read, desc=f"Tokenising {name}")
        return PreparedSplit(dataset=dataset)

    task = Task(
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
        compute_metrics=compute_metrics or accuracy,
        metric="accuracy",
        metric_label="accuracy",
        baseline=majority_share,
    )
    return (
        task
        if infilling is None
        else replace(task, label_words=_with_label_words(task, infilling, label_column))
    )


def accuracy(prediction: Any) -> dict[str, float]:
    """Returns the share of samples whose largest logit is at the label.

    Args:
        prediction: The Trainer's ``EvalPrediction``: logits (N, K), labels (N,).
    """
    return {"accuracy": float((_answers(prediction) == prediction.label_ids).mean())}


def accuracy_and_f1(prediction: Any) -> dict[str, float]:
    """Returns the accuracy and F1 of class 1; an F1 without any such label or answer counts as 0.

    Args:
        prediction: The Trainer's ``EvalPrediction``: logits (N, 2), labels (N,).
    """
    answered, labelled = _answers(prediction) == 1, np.asarray(prediction.label_ids) == 1
    chances = int(answered.sum() + labelled.sum())
    return {**accuracy(prediction), "f1": 2 * int((answered & labelled).sum()) / max(chances, 1)}


def _answers(prediction: Any) -> Any:
    # Some models return (logits, hidden states, …).
    logits = (
        prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    )
    return np.asarray(logits).argmax(axis=-1)


def majority_share(dataset: Dataset) -> float:
    """Returns the accuracy of the best constant answer on this split."""
    labels = list(dataset["labels"])
    return Counter(labels).most_common(1)[0][1] / len(labels)


def _with_label_words(task: Task, infilling: Infilling, label_column: str) -> Task:
    """The same task, answered by a masked language model."""
    labels = task.labels
    assert labels is not None

    def prepare(rows: Dataset, tokenizer: Tokenizer, length: int) -> PreparedSplit:
        refuse_missing_texts(rows, infilling.columns)
        refuse_wrong_labels(rows, label_column, labels)
        return prepare_infilling(
            rows, tokenizer, length, infilling=infilling, label_column=label_column, name=task.name
        )

    def adapt_model(model: nn.Module, tokenizer: Tokenizer) -> None:
        word_ids = label_word_ids(infilling.words, tokenizer)
        answer_at_mask(model, mask_token_id=tokenizer.mask_token_id, word_ids=word_ids)

    return replace(
        task,
        auto_model="AutoModelForMaskedLM",
        prepare=prepare,
        adapt_model=adapt_model,
        losses=class_losses,
    )
