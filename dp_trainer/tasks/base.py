"""What a task is: where its rows lie, how they become model inputs, what is measured.

A task is data, not a class hierarchy: a new one is one file that builds a
:class:`Task`, one row in ``dp_trainer.tasks.TASKS``, and one YAML file. Choices
that many tasks share (a sentence or a pair, read by an ordinary classification
head) are functions that build one, such as
:func:`dp_trainer.tasks.classification.sequence_classification`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dp_trainer.errors import ConfigurationError

# datasets, tokenizers and collators come from libraries without usable type
# information; the aliases keep signatures readable.
Dataset = Any
Tokenizer = Any
DataCollator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class BundledData:
    """Rows that ship with the package, under ``dp_trainer/tasks/data/<folder>/``."""

    folder: str


@dataclass(frozen=True, kw_only=True)
class HubData:
    """Rows on the hub: a repository, a configuration of it (or None), a commit or branch."""

    repository: str
    configuration: str | None = None
    revision: str = "main"


@dataclass(frozen=True, kw_only=True)
class PreparedSplit:
    """One split as model inputs: unpadded, one row a sample.

    Attributes:
        dataset: Columns are exactly what the model takes, ``labels`` among them.
        dropped: How many rows were left out because they were too long.
    """

    dataset: Dataset
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that is particular to one task.

    Guarantee: ``prepare`` looks at one row at a time. No row's inputs, and no
    decision to drop a row, depend on another row, so adding or removing a sample
    changes the prepared data by at most that sample.

    Attributes:
        name: The row's name in ``TASKS`` and in YAML.
        source: Where the rows lie unless the user says otherwise.
        train_split: Name of the split to train on.
        validation_split: Name of the split to evaluate on.
        further_splits: Splits evaluated after training where the data has them.
        columns: Columns that every split must have.
        labels: The classes, in the order of their ids; None for text generation.
        auto_model: The name of a ``transformers`` auto class.
        max_length: Longest input in tokens unless the user says otherwise.
        prepare: ``(split rows, tokenizer, max_length) -> PreparedSplit``.
        collator: ``tokenizer -> data collator`` that pads to the longest of a micro-batch.
        compute_metrics: For the Trainer: ``EvalPrediction -> {name: value}``.
        preprocess_logits: For the Trainer's ``preprocess_logits_for_metrics``, or None.
        metric: The metric that tells how well the task is solved, without the ``eval_`` prefix.
        metric_label: The same for people, as on a plot's axis.
        baseline: ``prepared split -> the metric of the best constant answer``, or None.
    """

    name: str
    source: BundledData | HubData
    train_split: str = "train"
    validation_split: str = "validation"
    further_splits: tuple[str, ...] = ()
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    auto_model: str
    max_length: int
    prepare: Callable[[Dataset, Tokenizer, int], PreparedSplit]
    collator: Callable[[Tokenizer], DataCollator]
    compute_metrics: Callable[[Any], dict[str, float]]
    preprocess_logits: Callable[[Any, Tensor], Tensor] | None = None
    metric: str
    metric_label: str
    baseline: Callable[[Dataset], float] | None = None

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """The splits that a report may evaluate, the validation split first."""
        return (self.validation_split, *self.further_splits)


def refuse_empty(splits: Mapping[str, PreparedSplit], *, max_length: int) -> None:
    """Raises ConfigurationError if preparing left a split without any sample."""
    for name, split in splits.items():
        if len(split.dataset) == 0:
            raise ConfigurationError(
                f"split '{name}': all {split.dropped} rows are longer than max_length={max_length} tokens. "
                "Raise max_length, or give shorter rows."
            )


def refuse_missing_texts(rows: Dataset, columns: tuple[str, ...]) -> None:
    """Raises ConfigurationError for a row whose text is missing or is no text."""
    for column in columns:
        bad = next((i for i, text in enumerate(rows[column]) if not isinstance(text, str)), None)
        if bad is not None:
            raise ConfigurationError(f"row {bad}, column '{column}': not a text. Remove or mend the row.")
