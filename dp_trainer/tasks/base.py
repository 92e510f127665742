"""What a task is: where its rows lie, how they become model inputs, what is measured.

A task is data, not a class hierarchy: a new one is one file that builds a
:class:`Task`, one row in ``dp_trainer.tasks.TASKS``, and one YAML file. Choices
that many tasks share (a sentence or a pair, read by a classification head or by
label words; a picture) are functions that build one, such as
:func:`dp_trainer.tasks.classification.sequence_classification`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dp_trainer.errors import ConfigurationError

# datasets, tokenizers and collators come from libraries without usable type
# information; the aliases keep signatures readable.
Dataset = Any
Tokenizer = Any
Processor = Any  # a tokenizer, or an image processor
DataCollator = Callable[[list[dict[str, Any]]], dict[str, Any]]
LossFunction = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class BundledData:
    """Rows that ship with the package, under ``dp_trainer/tasks/data/<folder>/``."""

    folder: str


@dataclass(frozen=True, kw_only=True)
class HubData:
    """Rows on the hub: a repository, a configuration of it (or None), a commit or branch.

    ``renamed`` lists columns as (name there, the task's name).
    """

    repository: str
    configuration: str | None = None
    revision: str = "main"
    renamed: tuple[tuple[str, str], ...] = ()


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
class Writing:
    """How a model is asked to write, for a task that is solved by texts.

    Attributes:
        prompt_column: Rows with the same text here are one prompt with several references.
        reference_column: What people wrote.
        encode: ``(prompts, tokenizer) -> token ids``: what stood before each reference in training.
    """

    prompt_column: str
    reference_column: str
    encode: Callable[[list[str], Tokenizer], list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that is particular to one task.

    Guarantee: ``prepare`` looks at one row at a time. No row's inputs, and no
    decision to drop a row, depend on another row, so adding or removing a sample
    changes the prepared data by at most that sample.

    Attributes:
        name: The row's name in ``TASKS`` and in YAML.
        source: Where the rows lie unless the user says otherwise; None where the user must.
        train_split: Name of the split to train on.
        validation_split: Name of the split to evaluate on.
        further_splits: Splits evaluated after training where the data has them.
        columns: Columns that every split must have.
        labels: The classes, in the order of their ids; None for text generation, and while only the data knows them.
        class_column: The column whose feature names the classes, where ``labels`` waits for the data.
        auto_model: The name of a ``transformers`` auto class.
        auto_processor: The auto class of what makes model inputs: a tokenizer or an image processor.
        max_length: Longest input in tokens unless the user says otherwise; 0 where inputs have no length.
        prepare: ``(split rows, processor, max_length) -> PreparedSplit``.
        collator: ``processor -> data collator`` that makes a micro-batch of samples.
        adapt_model: ``(model, processor)``: changes how the loaded model answers; None leaves it as loaded.
        losses: ``label smoothing -> compute_loss_func`` for either Trainer, where the model's class does not tell
            the loss; None where it does.
        compute_metrics: For the Trainer: ``EvalPrediction -> {name: value}``.
        preprocess_logits: For the Trainer's ``preprocess_logits_for_metrics``, or None.
        metric: The metric that tells how well the task is solved, without the ``eval_`` prefix.
        metric_label: The same for people, as on a plot's axis.
        baseline: ``prepared split -> the metric of the best constant answer``, or None.
        writing: How to let a trained model write, for tasks whose answers are texts; None for others.
        label_words: The same task answered by label words at a mask; None if it has no template.
    """

    name: str
    source: BundledData | HubData | None
    train_split: str = "train"
    validation_split: str = "validation"
    further_splits: tuple[str, ...] = ()
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    class_column: str | None = None
    auto_model: str
    auto_processor: str = "AutoTokenizer"
    max_length: int
    prepare: Callable[[Dataset, Processor, int], PreparedSplit]
    collator: Callable[[Processor], DataCollator]
    adapt_model: Callable[[nn.Module, Processor], None] | None = None
    losses: Callable[[float], LossFunction] | None = None
    compute_metrics: Callable[[Any], dict[str, float]]
    preprocess_logits: Callable[[Any, Tensor], Tensor] | None = None
    metric: str
    metric_label: str
    baseline: Callable[[Dataset], float] | None = None
    writing: Writing | None = None
    label_words: Task | None = None

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """The splits that a report may evaluate, the validation split first."""
        return (self.validation_split, *self.further_splits)

    def loss_function(self, *, label_smoothing: float) -> LossFunction | None:
        """The ``compute_loss_func`` that the task needs; None where the model's class tells the loss."""
        return None if self.losses is None else self.losses(label_smoothing)


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


def refuse_wrong_labels(rows: Dataset, column: str, labels: tuple[str, ...]) -> None:
    """Raises ConfigurationError for a label that is no class id, or classes in another order than the task's."""
    names = tuple(getattr(rows.features[column], "names", None) or labels)
    if names != labels and sorted(names) == sorted(labels):
        raise ConfigurationError(
            f"column '{column}': the data numbers the classes {names}, the task {labels}. Renumber the labels."
        )
    for i, label in enumerate(rows[column]):
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(labels):
            unlabelled = "; GLUE writes -1 where a label is kept secret" if label == -1 else ""
            raise ConfigurationError(
                f"row {i}, column '{column}': {label!r} is not a class id from 0 to {len(labels) - 1}{unlabelled}. "
                "Give integer ids; leave unlabelled rows out."
            )
