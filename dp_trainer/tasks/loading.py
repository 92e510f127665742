"""From a location (bundled, a folder, a hub name) to raw rows with checked columns.

Guarantee: a split that is returned has every column its task needs and at least
one row, and its rows come from where the user said. Nothing is downloaded for a
bundled or local location.
"""

from __future__ import annotations

import gzip
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import datasets

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.arguments import DataArguments
from dp_trainer.tasks.base import BundledData, Dataset, HubData, PreparedSplit, Processor, Task, refuse_empty
from dp_trainer.tasks.images import IMAGE_PROCESSOR, load_image_folder
from dp_trainer.tasks.names import nearest, quoted

FILE_ENDINGS = (".jsonl.gz", ".jsonl", ".json.gz", ".json")


def load_rows(task: Task, arguments: DataArguments) -> dict[str, Dataset]:
    """Loads a task's splits, untokenised.

    Args:
        task: The task whose splits and columns are wanted.
        arguments: Where to look, and how many rows of each split to keep.

    Returns:
        The train and validation splits, and the further splits that the data has.

    Raises:
        ConfigurationError: For a missing folder, file, split or column, an empty
            split, or a hub that cannot be reached.
    """
    rows = _load(task, arguments)
    limits = {task.train_split: arguments.max_train_samples}
    for name, split in rows.items():
        place = f"task '{task.name}', split '{name}'"
        _check_columns(split, task.columns, place=place)
        if len(split) == 0:
            raise ConfigurationError(
                f"{place}: no rows. Give a data set with at least one row in this split."
            )
        limit = limits.get(name, arguments.max_eval_samples)
        if limit is not None and limit < len(split):
            rows[name] = split.select(range(limit))
    return rows


def prepare_splits(
    task: Task,
    rows: dict[str, Dataset],
    processor: Processor,
    *,
    max_length: int | None,
    user_column: str | None = None,
) -> dict[str, PreparedSplit]:
    """Turns every split's rows into model inputs; refuses a split that ends up empty.

    Evaluation splits are sorted, longest first: no metric depends on their order,
    padding nearly vanishes, and a too large batch fails at once.

    Args:
        task: The task.
        rows: What ``load_rows`` returned.
        processor: A tokenizer or an image processor.
        max_length: Longest input in tokens; the task's own if None.
        user_column: Column of the training rows that says whose they are; it stays beside the inputs.

    Raises:
        ConfigurationError: If a split ends up empty, or a setting or column does not fit.
    """
    if task.max_length == 0 and max_length is not None:
        raise ConfigurationError(
            f"max_length={max_length}: inputs of task '{task.name}' have no length. Leave it out."
        )
    length = task.max_length if max_length is None else max_length
    kept = {task.train_split: [] if user_column is None else [user_column]}
    for name, split in rows.items():
        _check_columns(split, tuple(kept.get(name, ())), place=f"task '{task.name}', split '{name}'")
    splits = {
        name: task.prepare(split.select_columns([*task.columns, *kept.get(name, ())]), processor, length)
        for name, split in rows.items()
    }
    refuse_empty(splits, max_length=length)
    return {
        name: split if name == task.train_split else _longest_first(split) for name, split in splits.items()
    }


def _longest_first(split: PreparedSplit) -> PreparedSplit:
    if "input_ids" not in getattr(split.dataset, "column_names", ()):
        return split
    lengths = [len(ids) for ids in split.dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return replace(split, dataset=split.dataset.select(order))


def _load(task: Task, arguments: DataArguments) -> dict[str, Dataset]:
    if arguments.data is None and isinstance(task.source, BundledData):
        resource = files("dp_trainer.tasks").joinpath("data", task.source.folder)
        # A zipped installation has no folder until as_file makes one.
        with as_file(resource) as folder:
            return _load_folder(task, folder)
    if arguments.data is None and task.source is None:
        raise ConfigurationError(
            f"task '{task.name}': has no data of its own. Give data=<folder> or data=<hub name>."
        )
    if arguments.data is None:
        assert isinstance(task.source, HubData)
        return _load_hub(task, task.source)
    folder = Path(arguments.data).expanduser()
    if folder.is_dir():
        images = task.auto_processor == IMAGE_PROCESSOR
        return load_image_folder(task, folder) if images else _load_folder(task, folder)
    if folder.exists():
        raise ConfigurationError(
            f"data={arguments.data}: this is a file. Give the folder that holds one file a split, "
            f"such as {task.train_split}{FILE_ENDINGS[0]}."
        )
    if _looks_like_a_path(arguments.data):
        raise ConfigurationError(
            f"data={arguments.data}: no such folder (looked in {folder.resolve()}). "
            "Give an existing folder, or a hub name such as 'owner/name'."
        )
    revision = arguments.data_revision
    return _load_hub(
        task, HubData(repository=arguments.data, configuration=arguments.data_config, revision=revision)
    )


def _looks_like_a_path(location: str) -> bool:
    return location.startswith((".", "/", "~")) or location.count("/") > 1 or "\\" in location


def _load_folder(task: Task, folder: Path) -> dict[str, Dataset]:
    paths = {}
    for split in (task.train_split, *task.evaluation_splits):
        candidates = (folder / f"{split}{ending}" for ending in FILE_ENDINGS)
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is not None:
            paths[split] = path
        elif split not in task.further_splits:
            raise ConfigurationError(
                f"data={folder}: no file for split '{split}'; the folder holds "
                f"{quoted(sorted(entry.name for entry in folder.iterdir()))}. "
                f"Name it {split} with one of the endings {', '.join(FILE_ENDINGS)}."
            )
    return {name: _read_file(path, name) for name, path in paths.items()}


def _read_file(path: Path, split: str) -> Dataset:
    """Reads one split; on its own, because a joint load would guess a schema for an empty one."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            empty = not any(line.strip() for line in file)
        # The library raises StopIteration for a file without rows.
        if empty:
            raise ConfigurationError(f"{path}: no rows. Give at least one JSON object a line.")
        return datasets.load_dataset("json", data_files={split: str(path)}, split=split)
    except (datasets.exceptions.DatasetGenerationError, OSError, EOFError) as error:
        cause = str(error.__cause__ or error).strip() or type(error).__name__
        raise ConfigurationError(
            f"{path}: not readable as JSON lines ({cause.splitlines()[0]}). Give one JSON object a line."
        ) from error


def _load_hub(task: Task, source: HubData) -> dict[str, Dataset]:
    try:
        everything = datasets.load_dataset(
            source.repository,
            source.configuration,
            revision=None if source.revision == "main" else source.revision,
        )
    except (OSError, ValueError) as error:
        # Not found, no such configuration, no network and offline mode all end here.
        raise ConfigurationError(
            f"task '{task.name}': cannot load '{source.repository}' from the hub ({str(error).splitlines()[0]}). "
            f"Connect to the network once so that it is cached, or give data=<folder> with {_wanted_in_folder(task)}."
        ) from error
    for split in (task.train_split, task.validation_split):
        if split not in everything:
            raise ConfigurationError(
                f"'{source.repository}': no split '{split}'; it has {quoted(everything)}. "
                "Give data=<folder> with one file a split."
            )
    wanted = (task.train_split, *task.evaluation_splits)
    return {name: _renamed(everything[name], source) for name in wanted if name in everything}


def _wanted_in_folder(task: Task) -> str:
    ending = "/<class>/" if task.auto_processor == IMAGE_PROCESSOR else FILE_ENDINGS[0]
    return f"{task.train_split}{ending} and {task.validation_split}{ending}"


def _renamed(split: Dataset, source: HubData) -> Dataset:
    for there, here in source.renamed:
        split = split.rename_column(there, here) if there in split.column_names else split
    return split


def _check_columns(split: Dataset, needed: tuple[str, ...], *, place: str) -> None:
    present = split.column_names
    for column in needed:
        if column not in present:
            raise ConfigurationError(
                f"{place}: no column '{column}'; there are {quoted(present)}, "
                f"the nearest is {quoted(nearest(column, present))}. Rename it in the data."
            )
