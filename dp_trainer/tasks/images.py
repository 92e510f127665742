"""Image classification: a folder of class folders, or a data set of the hub.

Guarantee: a sample's pixels and label come from its own row alone. Images are
read and processed when they are asked for, so a prepared split takes no more
disk than the images themselves.

Shapes: pixel values (3, height, width) for a sample; label ids 0 … K−1.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.utils.data

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.base import (
    Dataset,
    HubData,
    PreparedSplit,
    Processor,
    Task,
    refuse_wrong_labels,
)
from dp_trainer.tasks.classification import accuracy
from dp_trainer.tasks.names import quoted

IMAGE_PROCESSOR = "AutoImageProcessor"
IMAGE, LABEL = "image", "label"


@dataclass(frozen=True)
class ImageSamples(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows as model inputs, made when asked for.

    A plain dataset and not a table with a transform: the Trainer drops columns that the model
    does not take from a table, the unread images among them.

    Args:
        rows: A table with the columns ``image`` and ``label``.
        processor: The model's image processor.
    """

    rows: Dataset
    processor: Processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the pixels and the label of a row.

        Raises:
            ConfigurationError: If the image cannot be read.
        """
        try:
            row = self.rows[index]
            # Grey images and those with transparency, too, have the three channels that models take.
            image = row[IMAGE].convert("RGB")
        except OSError as error:
            raise ConfigurationError(
                f"row {index}, column '{IMAGE}': not readable as an image ({error}). Remove or mend it."
            ) from error
        return {
            "pixel_values": self.processor(image, return_tensors="pt")["pixel_values"][0],
            "labels": row[LABEL],
        }

    @property
    def labels(self) -> list[int]:
        """All labels, without reading an image."""
        return list(self.rows[LABEL])


def image_classification(
    *,
    name: str,
    source: HubData | None,
    validation_split: str = "validation",
    further_splits: tuple[str, ...] = (),
) -> Task:
    """Describes a task that assigns one of the data's own classes to an image.

    Args:
        name: The task's name.
        source: Where its rows lie unless the user says otherwise; None if the user must.
        validation_split: Name of the split to evaluate on.
        further_splits: Splits evaluated after training where the data has them.
    """
    return Task(
        name=name,
        source=source,
        validation_split=validation_split,
        further_splits=further_splits,
        columns=(IMAGE, LABEL),
        labels=None,
        class_column=LABEL,
        auto_model="AutoModelForImageClassification",
        auto_processor=IMAGE_PROCESSOR,
        max_length=0,
        prepare=prepare_images,
        collator=lambda _processor: stack_images,
        compute_metrics=accuracy,
        metric="accuracy",
        metric_label="accuracy",
        baseline=lambda samples: Counter(samples.labels).most_common(1)[0][1] / len(samples),
    )


def with_classes(task: Task, rows: dict[str, Dataset]) -> Task:
    """Returns the task with the classes that the data names; a task that knows its own stays as it is.

    Raises:
        ConfigurationError: If the data names no classes, or the splits number them differently.
    """
    if task.class_column is None:
        return task
    names = {
        split: getattr(table.features[task.class_column], "names", None) for split, table in rows.items()
    }
    first = names[task.train_split]
    if not first or any(other != first for other in names.values()):
        raise ConfigurationError(
            f"task '{task.name}', column '{task.class_column}': each split must name the same classes in the same "
            f"order, and they are {names}. Make the column a ClassLabel feature of these names."
        )
    return replace(task, labels=tuple(first))


def prepare_images(rows: Dataset, processor: Processor, _length: int) -> PreparedSplit:
    """Checks every row's label; images are read later, one at a time."""
    if not isinstance(rows.features[IMAGE], datasets.Image):
        raise ConfigurationError(
            f"column '{IMAGE}': holds {rows.features[IMAGE]}, not images. Cast it to datasets.Image()."
        )
    refuse_wrong_labels(rows, LABEL, tuple(rows.features[LABEL].names))
    return PreparedSplit(dataset=ImageSamples(rows, processor))


def stack_images(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns pixel values (B, 3, height, width) and labels (B,).

    Raises:
        ConfigurationError: If the images differ in size.
    """
    shapes = {tuple(sample["pixel_values"].shape) for sample in samples}
    if len(shapes) > 1:
        raise ConfigurationError(
            f"images of one micro-batch have the sizes {sorted(shapes)}. Let the image processor resize them "
            "(do_resize and size in preprocessor_config.json)."
        )
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


def load_image_folder(task: Task, folder: Path) -> dict[str, Dataset]:
    """Loads ``<folder>/<split>/<class>/<file>``; without a validation split, ``test`` is evaluated in its place.

    Raises:
        ConfigurationError: For a missing split or class, images that lie elsewhere, or missing Pillow.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ConfigurationError(
            f"task '{task.name}': needs the package Pillow. Install it: pip install pillow"
        )
    folders = {
        split: folder / split
        for split in (task.train_split, *task.evaluation_splits)
        if (folder / split).is_dir()
    }
    if task.validation_split not in folders and (folder / "test").is_dir():
        folders.pop("test", None)
        folders[task.validation_split] = folder / "test"
    for split in (task.train_split, task.validation_split):
        if split not in folders:
            raise ConfigurationError(
                f"data={folder}: no folder '{split}'; it holds {quoted(sorted(e.name for e in folder.iterdir()))}. "
                f"Give {split}/<class>/ with the images of each class."
            )
    known = _class_folders(folders[task.train_split])
    for split, place in folders.items():
        found = _class_folders(place)
        if not found or found - known:
            raise ConfigurationError(
                f"{place}: has the class folders {quoted(sorted(found))}, and '{task.train_split}' has "
                f"{quoted(sorted(known))}. Give '{split}' some of these, one folder a class."
            )
    try:
        rows = datasets.load_dataset(
            "imagefolder",
            data_files={split: str(place / "*" / "*") for split, place in folders.items()},
            drop_labels=False,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = str(error.__cause__ or error).strip() or type(error).__name__
        raise ConfigurationError(
            f"data={folder}: not readable as images ({cause.splitlines()[0]}). Give image files in <split>/<class>/."
        ) from error
    return dict(rows)


def _class_folders(place: Path) -> set[str]:
    return {entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(".")}


# A folder's rows come class by class: to try a run on fewer, take images out of every class rather than
# set max_train_samples.
IMAGE_FOLDER = image_classification(name="image_folder", source=None, further_splits=("test",))

# Krizhevsky 2009; the data has no validation split.
CIFAR10 = image_classification(
    name="cifar10",
    source=HubData(repository="uoft-cs/cifar10", renamed=(("img", IMAGE),)),
    validation_split="test",
)
