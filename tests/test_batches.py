"""Logical batches: nothing drawn is lost, nothing is merged, and cutting only saves padding."""

import pickle
from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from dp_trainer.batches import (
    LogicalBatch,
    LogicalBatchCollator,
    column_lengths,
    micro_batch_size,
    sample_lengths,
    sample_of,
    select,
    split_micro_batch,
)
from dp_trainer.errors import ConfigurationError


def pad(samples):
    """The obvious collator: zeros on the right of every list, one row a sample."""
    longest = max(len(s["input_ids"]) for s in samples)
    rows = [list(s["input_ids"]) + [0] * (longest - len(s["input_ids"])) for s in samples]
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor([s["labels"] for s in samples])}


def samples_of(lengths):
    """Samples that carry their index as label, and no padding token inside."""
    return [{"input_ids": [7] * length, "labels": index} for index, length in enumerate(lengths)]


def collator(**changes):
    return LogicalBatchCollator(**{"data_collator": pad, "samples_per_micro_batch": 4, **changes})


LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(lengths=LENGTHS, samples=st.integers(1, 9), tokens=st.none() | st.integers(1, 90))
def test_every_drawn_sample_is_there_once(lengths, samples, tokens):
    batch = collator(samples_per_micro_batch=samples, tokens_per_micro_batch=tokens)(samples_of(lengths))
    seen = Counter(
        (int(label), int((row != 0).sum()))
        for micro_batch in batch.micro_batches
        for row, label in zip(micro_batch["input_ids"], micro_batch["labels"], strict=True)
    )
    assert seen == Counter(enumerate(lengths))
    assert batch.size == len(lengths)
    assert batch.sample_counts == tuple(len(m["labels"]) for m in batch.micro_batches)


@given(lengths=LENGTHS, samples=st.integers(1, 9))
def test_number_of_samples_is_limited_and_longest_come_first(lengths, samples):
    batch = collator(samples_per_micro_batch=samples)(samples_of(lengths))
    widths = [m["input_ids"].shape[1] for m in batch.micro_batches]
    assert widths == sorted(widths, reverse=True)
    assert all(min(samples, len(lengths)) <= count <= 4 * samples for count in batch.sample_counts[:-1])
    # No micro-batch holds more padded tokens than as many samples of the greatest length.
    shapes = [m["input_ids"].shape for m in batch.micro_batches]
    assert all(rows * width <= samples * max(lengths) for rows, width in shapes)
    # Nor fewer than it could.
    assert all(
        (rows + 1) * width > samples * max(lengths) or rows == 4 * samples for rows, width in shapes[:-1]
    )


@given(lengths=LENGTHS, tokens=st.integers(1, 90))
def test_token_budget_alone_decides(lengths, tokens):
    batch = collator(samples_per_micro_batch=1, tokens_per_micro_batch=tokens)(samples_of(lengths))
    shapes = [m["input_ids"].shape for m in batch.micro_batches]
    assert all(rows * width <= tokens or rows == 1 for rows, width in shapes)
    # No micro-batch is smaller than it need be: its own width would have had room for one more.
    assert all((rows + 1) * width > tokens for rows, width in shapes[:-1])


def test_sorting_saves_padding():
    lengths = [30, 2, 29, 3, 28, 1, 31, 2]
    padded = sum(m["input_ids"].numel() for m in collator()(samples_of(lengths)).micro_batches)
    unsorted = sum(pad(samples_of(lengths)[i : i + 4])["input_ids"].numel() for i in (0, 4))
    assert padded == 4 * 31 + 4 * 3
    assert unsorted == 4 * 30 + 4 * 31


@pytest.mark.parametrize(("samples", "lengths"), [
    ([], []),
    ([{"input_ids": [1, 2]}, {"input_ids": torch.ones(3)}], [2, 3]),
    ([{"input_ids": [1, 2], "labels": [-100, 2]}], [2]),
    ([{"input_ids": [1, 2], "labels": 1}], [2]),
    ([{"input_ids": [1, 2], "labels": torch.tensor(1)}], [2]),
    # A decoder reads the labels. The second sample's are as long as its input only by chance.
    ([{"input_ids": [1, 2], "labels": [1, 2, 3]}, {"input_ids": [1], "labels": [2]}], [5, 2]),
    ([{"attention_mask": [1, 1, 1]}], [3]),
    ([{"input_ids": [[1, 2], [1, 2, 3]], "labels": 0}], [6]),  # two choices, padded to three
    ([{"input_features": torch.zeros(4, 9)}], [9]),
    ([{"input_values": torch.zeros(50)}], [50]),
    ([{"pixel_values": torch.zeros(3, 8, 8), "labels": 1}], [None]),
])  # fmt: skip
def test_sample_lengths(samples, lengths):
    assert sample_lengths(samples) == lengths


def stack(samples):
    return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


def test_images_are_cut_by_number_and_refused_a_token_budget():
    images = [{"pixel_values": torch.zeros(3, 2, 2)} for _ in range(5)]
    assert collator(data_collator=stack, samples_per_micro_batch=2)(images).sample_counts == (2, 2, 1)
    with pytest.raises(ConfigurationError, match="tokens_per_micro_batch is set"):
        collator(data_collator=stack, tokens_per_micro_batch=8)(images)


def test_an_empty_draw_has_no_micro_batch():
    empty = collator()([])
    assert empty == LogicalBatch((), ())
    assert empty.size == 0


class Draws:
    """A batch sampler whose second draw is empty."""

    def __iter__(self):
        return iter([[3, 0, 4], [], [1]])

    def __len__(self):
        return 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_data_loader_yields_logical_batches_and_empty_ones(workers, kind):
    samples = samples_of([5, 3, 9, 2, 8])
    if kind == "dataset":
        datasets = pytest.importorskip("datasets")
        samples = datasets.Dataset.from_list(samples)
    loader = DataLoader(samples, batch_sampler=Draws(), collate_fn=collator(), num_workers=workers)
    batches = list(loader)
    assert [batch.size for batch in batches] == [3, 0, 1]
    assert [m["labels"].tolist() for m in batches[0].micro_batches] == [[4, 0, 3]]
    assert batches[1].micro_batches == ()


def test_pickles_and_asks_the_trainer_for_no_target_count():
    batch = collator()(samples_of([3, 1]))
    again = pickle.loads(pickle.dumps(batch))
    torch.testing.assert_close(again.micro_batches, batch.micro_batches)
    assert "labels" not in batch
    assert hasattr(batch, "pin_memory")


def test_pin_memory_pins_every_tensor_and_keeps_the_rest(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = LogicalBatch(({**MICRO_BATCH},), (3,))
    again = batch.pin_memory()
    assert len(pinned) == 3
    assert again.micro_batches[0]["input_ids"] is not MICRO_BATCH["input_ids"]
    torch.testing.assert_close(again.micro_batches[0]["input_ids"], MICRO_BATCH["input_ids"])
    assert (again.sample_counts, again.micro_batches[0]["use_cache"]) == ((3,), False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_memory_is_page_locked():
    batch = collator()(samples_of([3, 1])).pin_memory()
    assert all(m["input_ids"].is_pinned() for m in batch.micro_batches)


def packed(samples):
    """A padding-free collator: all samples in one row."""
    return {"input_ids": torch.tensor([[token for s in samples for token in s["input_ids"]]])}


def dropping(samples):
    return pad(samples[:-1])


def mixed(samples):
    return {**pad(samples), "position_ids": torch.arange(3)[None]}


def listed(samples):
    return {**pad(samples), "texts": ["a", "b"]}


@pytest.mark.parametrize(("wrong", "message"), [
    (packed, r"packed made 1 rows of 2 samples: .*\(1, 4\)"),
    (dropping, "dropping made 1 rows of 2 samples"),
    (mixed, r"mixed: .*'position_ids': 1.*Repeat what all samples share"),
    (listed, "listed: 'texts' of a micro-batch is a list"),
    (lambda samples: torch.zeros(2, 2), "returned a Tensor"),
    (lambda samples: {"flag": True}, "must all have samples"),
])  # fmt: skip
def test_collators_that_do_not_keep_samples_apart_are_refused(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        collator(data_collator=wrong)(samples_of([3, 1]))


def test_a_merged_sample_is_refused_even_where_another_micro_batch_is_fine():
    def last_is_merged(samples):
        return pad(samples) if len(samples) == 4 else packed(samples)

    with pytest.raises(ConfigurationError, match="last_is_merged made 1 rows of 2 samples"):
        collator(data_collator=last_is_merged)(samples_of([3, 1, 2, 4, 5, 6]))


def test_samples_must_be_mappings():
    with pytest.raises(ConfigurationError, match="a sample of the training set is a list"):
        collator()([[1, 2]])
    batch = collator()([BatchEncoding(sample) for sample in samples_of([2, 3])])
    assert batch.sample_counts == (2,)


@pytest.mark.parametrize("limits", [{"samples_per_micro_batch": 0}, {"tokens_per_micro_batch": 0}])
def test_limits_must_be_positive(limits):
    with pytest.raises(ConfigurationError, match="must be at least 1"):
        collator(**limits)


MICRO_BATCH = {
    "input_ids": torch.arange(12).view(3, 4),
    "labels": torch.tensor([5, 6, 7]),
    "temperature": torch.tensor(2.0),
    "use_cache": False,
    "head_mask": None,
}


def test_micro_batches_split_into_samples_and_back():
    assert micro_batch_size(MICRO_BATCH) == 3
    one = sample_of(MICRO_BATCH, 1)
    assert one["input_ids"].tolist() == [[4, 5, 6, 7]]
    assert one["labels"].tolist() == [6]
    assert (one["temperature"], one["use_cache"], one["head_mask"]) == (2.0, False, None)
    two = select(MICRO_BATCH, [2, 0])
    assert two["labels"].tolist() == [7, 5]
    assert select(MICRO_BATCH, [])["input_ids"].shape == (0, 4)
    parts = split_micro_batch(MICRO_BATCH)
    torch.testing.assert_close(torch.cat([part["input_ids"] for part in parts]), MICRO_BATCH["input_ids"])


@pytest.mark.parametrize("index", [3, -1])
def test_samples_that_do_not_exist_are_refused(index):
    with pytest.raises(ConfigurationError, match="do not all exist"):
        sample_of(MICRO_BATCH, index)


def test_unequal_sample_counts_are_refused():
    with pytest.raises(ConfigurationError, match="sample counts"):
        LogicalBatch(({},), ())


def test_a_table_tells_all_lengths_without_making_samples():
    rows = [{"input_ids": [1] * n, "attention_mask": [1] * n, "labels": 0} for n in (3, 1, 7, 2)]
    table = datasets.Dataset.from_list(rows)
    assert column_lengths(table) == [3, 1, 7, 2]
    assert column_lengths(table.select([2, 0])) == [7, 3]
    assert column_lengths(table.with_format("torch")) == [3, 1, 7, 2]


@pytest.mark.parametrize(
    "dataset", [[{"input_ids": [1, 2]}], datasets.Dataset.from_list([{"text": "a"}])], ids=["list", "text"]
)
def test_what_tells_no_lengths_is_left_to_chance(dataset):
    assert column_lengths(dataset) is None
