"""Logical batches: drawn samples, sorted by length and cut into micro-batches.

Guarantee: a logical batch holds exactly the samples that were drawn, each once.
Sorting and cutting change cost only: the release sums over all micro-batches
and divides by a public constant, so neither order nor grouping can be seen in
it. What could break that, a collator that merges or drops samples, is refused.

Plain batches of random samples are padded to their longest member. Here the
order is free, so neighbours in length share a micro-batch and padding nearly
vanishes; the longest come first, so that running out of memory shows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dp_trainer.errors import ConfigurationError

DataCollator = Callable[[list[Any]], Any]

# The first of these that a sample has says how long it is. Audio features are (mel bands, frames).
_LENGTH_COLUMNS = ("input_ids", "attention_mask", "inputs_embeds", "input_values", "input_features")

# Values that apply to a whole micro-batch alike, such as flags of the forward pass.
_SHARED_TYPES = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class LogicalBatch:
    """One draw of the sampler, collated: what the train DataLoader yields.

    Args:
        micro_batches: Model inputs, longest samples first; none for an empty draw.
        sample_counts: How many samples each micro-batch holds.
    """

    micro_batches: tuple[dict[str, Any], ...]
    sample_counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.micro_batches) != len(self.sample_counts):
            raise ConfigurationError(
                f"a logical batch of {len(self.micro_batches)} micro-batches got {len(self.sample_counts)} "
                "sample counts; give one for each."
            )

    @property
    def size(self) -> int:
        """How many samples were drawn. Private: it must not shape what is released."""
        return sum(self.sample_counts)

    def __contains__(self, column: str) -> bool:
        """Always false. The Trainer asks for ``"labels"`` to scale losses by the batch's count of targets."""
        return False

    def pin_memory(self) -> LogicalBatch:
        """Returns a copy in page-locked memory; the DataLoader calls this."""
        pinned = tuple(
            {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
            for batch in self.micro_batches
        )
        return LogicalBatch(pinned, self.sample_counts)


# Short samples in a micro-batch, for each long one that fits: what is stored for every sample, such as the
# gradients of biases, does not grow with its length.
_MOST_SHORT_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class LogicalBatchCollator:
    """Makes a :class:`LogicalBatch` of the samples that one draw of the sampler selected.

    Guarantee: every sample lies in exactly one micro-batch, and row b of each
    tensor in it belongs to the b-th sample given to ``data_collator``, as far
    as the number of rows tells.

    Args:
        data_collator: Makes tensors of a list of samples, as for the plain Trainer.
        samples_per_micro_batch: How many samples of the draw's greatest length fit in a
            micro-batch. Where lengths are known, up to four times as many shorter ones
            take their place, padding included: many small calls would cost more.
        tokens_per_micro_batch: If given, it alone decides: samples times the longest
            sample's length stay within it, except for a sample that is longer by itself.

    Raises:
        ConfigurationError: If a limit is not positive; on a call, if samples have no
            length to budget by, or the collator does not keep samples apart.
    """

    data_collator: DataCollator
    samples_per_micro_batch: int
    tokens_per_micro_batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples_per_micro_batch", "tokens_per_micro_batch"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ConfigurationError(f"{name} is {limit}; it must be at least 1.")

    def __call__(self, samples: Sequence[Any]) -> LogicalBatch:
        """Sorts, cuts and collates; an empty draw gives a logical batch without micro-batches."""
        groups = [[samples[i] for i in group] for group in self._cut(sample_lengths(samples))]
        return LogicalBatch(
            tuple(self._collate(group) for group in groups), tuple(len(group) for group in groups)
        )

    def _cut(self, lengths: Sequence[int | None]) -> list[list[int]]:
        """Groups sample indices into micro-batches, longest first."""
        budget = self.tokens_per_micro_batch
        if budget is not None and None in lengths:
            raise ConfigurationError(
                "tokens_per_micro_batch is set, but a sample has none of the columns that tell its length: "
                f"{', '.join(_LENGTH_COLUMNS)}. Leave it unset, so that the number of samples decides."
            )
        order = sorted(range(len(lengths)), key=lambda i: -(lengths[i] or 0))
        most = len(lengths)
        if budget is None:
            most = self.samples_per_micro_batch * (1 if None in lengths else _MOST_SHORT_SAMPLES)
            budget = self.samples_per_micro_batch * max((length or 1 for length in lengths), default=1)
        groups = []
        while order:
            longest = max(lengths[order[0]] or 0, 1)
            count = min(max(budget // longest, 1), most)
            groups.append(order[:count])
            order = order[count:]
        return groups

    def _collate(self, samples: list[Any]) -> dict[str, Any]:
        collator = self.data_collator
        name = getattr(collator, "__name__", type(collator).__name__)
        batch = collator(samples)
        if not isinstance(batch, Mapping):
            raise ConfigurationError(
                f"data collator {name} returned a {type(batch).__name__}; a micro-batch must be a mapping "
                "from argument names of the model to tensors."
            )
        # A collator may return a class of its own with shared storage; a plain dict pickles and pins.
        micro_batch = dict(batch)
        try:
            rows = micro_batch_size(micro_batch)
        except ConfigurationError as error:
            raise ConfigurationError(f"data collator {name}: {error}") from error
        if rows != len(samples):
            shapes = {key: tuple(v.shape) for key, v in micro_batch.items() if isinstance(v, Tensor)}
            raise ConfigurationError(
                f"data collator {name} made {rows} rows of {len(samples)} samples: {shapes}. Merged (packed, "
                "padding-free) or dropped samples cannot be clipped one by one: use a collator that pads."
            )
        return micro_batch


def sample_lengths(samples: Sequence[Any]) -> list[int | None]:
    """Returns each sample's length in positions; None where no column tells it (images).

    The first of input_ids, attention_mask, inputs_embeds, input_values and
    input_features that a sample has counts; a list of choices counts as all its
    choices, padded. Where some sample's labels are a sequence of another length
    than its inputs, a decoder reads the labels, and they are added for all.

    Raises:
        ConfigurationError: If a sample is not a mapping.
    """
    for sample in samples:
        if not isinstance(sample, Mapping):
            raise ConfigurationError(
                f"a sample of the training set is a {type(sample).__name__}; it must be a mapping from column "
                "names to values."
            )
    inputs = [_input_length(sample) for sample in samples]
    targets = [_length(sample.get("labels")) for sample in samples]
    if all(target in (None, length) for target, length in zip(targets, inputs, strict=True)):
        return inputs
    return [
        None if length is None else length + (target or 0)
        for target, length in zip(targets, inputs, strict=True)
    ]


def column_lengths(dataset: Any) -> list[int] | None:
    """Returns the lengths of all samples where a table knows them without making samples; else None.

    Args:
        dataset: The training set; of Arrow tables, the first column of lists that tells a length is read.
    """
    columns = getattr(dataset, "column_names", None)
    column = next((c for c in _LENGTH_COLUMNS if columns and c in columns), None)
    if (
        column is None
        or not hasattr(dataset, "with_format")
        or getattr(dataset, "_format_type", None) == "custom"
    ):
        return None
    table = dataset.select_columns([column]).with_format("arrow")
    lengths: list[int] = []
    for batch in table.iter(batch_size=10_000):
        values = batch.column(column)
        if "list" not in str(values.type):
            return None
        lengths += [len(value) for value in values]
    return lengths


def spread_by_length(samples: Sequence[Any], count: int) -> list[Any]:
    """Returns up to ``count`` of the samples, their lengths spread evenly from the shortest to the longest."""
    lengths = sample_lengths(samples)
    order = sorted(range(len(samples)), key=lambda index: lengths[index] or 0)
    count = min(count, len(order))
    return [samples[order[index * (len(order) - 1) // max(1, count - 1)]] for index in range(count)]


def _input_length(sample: Mapping[str, Any]) -> int | None:
    column = next((c for c in _LENGTH_COLUMNS if sample.get(c) is not None), None)
    if column is None:
        return None
    value = sample[column]
    length = _length(value)
    if not length or column in ("inputs_embeds", "input_values"):
        return length
    inner = [_length(row) or 0 for row in value] if _length(value[0]) is not None else None
    if inner is None:
        return length
    # Choices are padded to the longest and read one beside the other; of features, time is the longer axis.
    return length * max(inner) if column != "input_features" else max(length, *inner)


def _length(value: Any) -> int | None:
    """How many entries a list, array or tensor has along its first axis; None for single values."""
    single = isinstance(value, str) or not isinstance(value, Sized) or getattr(value, "shape", None) == ()
    return None if single else len(value)


def micro_batch_size(micro_batch: Mapping[str, Any]) -> int:
    """Returns the number of samples: the first axis of every tensor that has axes.

    Raises:
        ConfigurationError: If the tensors disagree, there are none, or a value is
            of a type whose samples cannot be told apart.
    """
    sizes = {}
    for key, value in micro_batch.items():
        if isinstance(value, Tensor):
            if value.dim():
                sizes[key] = value.shape[0]
        elif not isinstance(value, _SHARED_TYPES):
            raise ConfigurationError(
                f"'{key}' of a micro-batch is a {type(value).__name__}; only tensors with samples along their "
                "first axis, and plain values shared by all samples, can be split into samples."
            )
    if len(set(sizes.values())) != 1:
        raise ConfigurationError(
            f"the tensors of a micro-batch must all have samples along their first axis; their lengths are "
            f"{sizes}. Repeat what all samples share, such as position_ids, for every sample."
        )
    return next(iter(sizes.values()))


def select(micro_batch: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """Returns the micro-batch of these samples, in this order; shared values pass through.

    Raises:
        ConfigurationError: As :func:`micro_batch_size`, or if an index is out of range.
    """
    size = micro_batch_size(micro_batch)
    if not all(0 <= i < size for i in indices):
        raise ConfigurationError(f"samples {list(indices)} of a micro-batch of {size} do not all exist.")
    return {
        key: value[torch.tensor(list(indices), dtype=torch.long, device=value.device)]
        if isinstance(value, Tensor) and value.dim()
        else value
        for key, value in micro_batch.items()
    }


def sample_of(micro_batch: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns the micro-batch of one sample: first axes have length 1."""
    return select(micro_batch, [index])


def split_micro_batch(micro_batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns each sample as a micro-batch of its own."""
    return [sample_of(micro_batch, i) for i in range(micro_batch_size(micro_batch))]
