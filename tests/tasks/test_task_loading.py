import gzip
import json

import datasets
import numpy as np
import pytest
from toys import roberta_like_tokenizer
from transformers import EvalPrediction

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks import TASKS, find_task
from dp_trainer.tasks.arguments import HEADS, DataArguments
from dp_trainer.tasks.classification import accuracy, majority_share
from dp_trainer.tasks.loading import load_rows, prepare_splits

ROWS = [{"sentence": "good film", "label": 1}, {"sentence": "bad film", "label": 0}]


def write_split(folder, name, rows):
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    write_split(tmp_path, "train", ROWS * 3)
    write_split(tmp_path, "validation", ROWS)
    return tmp_path


def load(folder, task="sst2", **settings):
    return load_rows(TASKS[task], DataArguments(task=task, data=str(folder), **settings))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("sentiment", {"train": 17345, "validation": 2000}),
        ("e2e", {"train": 42061, "validation": 4672, "test": 4693}),
    ],
)
def test_bundled_data_is_complete(name, sizes):
    rows = load_rows(TASKS[name], DataArguments(task=name))
    assert {split: len(data) for split, data in rows.items()} == sizes


def test_table_rows_stand_under_their_own_name():
    assert all(task.name == name for name, task in TASKS.items())


def test_unknown_task_names_the_nearest():
    with pytest.raises(ConfigurationError, match=r"Did you mean 'sentiment'\?"):
        find_task("sentimant")


def test_limits_keep_the_first_rows(folder):
    rows = load(folder, max_train_samples=5, max_eval_samples=1)
    assert [len(rows["train"]), len(rows["validation"])] == [5, 1]
    assert list(rows["train"]["sentence"]) == [row["sentence"] for row in (ROWS * 3)[:5]]


def test_plain_json_lines_are_read_too(folder):
    (folder / "train.jsonl.gz").unlink()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert len(load(folder)["train"]) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "good", "label": 1}], r"no column 'sentence'; there are 'text', 'label'"),
        ([{"sentences": "good", "label": 1}], r"the nearest is 'sentences'"),
        ([], r"train.jsonl.gz: no rows"),
    ],
)
def test_unfit_rows_are_refused(folder, rows, message):
    write_split(folder, "train", rows)
    with pytest.raises(ConfigurationError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b"sentence\tlabel\ngood\t1\n"), b"not gzip", gzip.compress(b"{}" * 99)[:-9]],
    ids=[
        "tab-separated",
        "not-gzip",
        "truncated",
    ],  # gzip writes the time, so contents differ between workers
)
def test_files_that_are_not_json_lines_are_refused(folder, content):
    (folder / "train.jsonl.gz").write_bytes(content)
    with pytest.raises(ConfigurationError, match="not readable as JSON lines"):
        load(folder)


def test_missing_split_names_what_is_there(folder):
    (folder / "validation.jsonl.gz").unlink()
    with pytest.raises(ConfigurationError, match=r"split 'validation'; the folder holds 'train.jsonl.gz'"):
        load(folder)


@pytest.mark.parametrize(
    ("location", "message"),
    [("./nowhere", "no such folder"), ("~/no/where", "no such folder"), ("train.jsonl.gz", "this is a file")],
)
def test_wrong_locations_are_refused(folder, monkeypatch, location, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigurationError, match=message):
        load(location)


def test_unreachable_hub_says_how_to_go_on(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigurationError, match=r"cannot load 'nyu-mll/glue'.*give data=<folder>"):
        load_rows(TASKS["sst2"], DataArguments(task="sst2"))


def test_hub_split_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: {"train": datasets.Dataset.from_list(ROWS)}
    )
    with pytest.raises(ConfigurationError, match="no split 'validation'; it has 'train'"):
        load_rows(TASKS["sst2"], DataArguments(task="sst2"))


def test_classification_inputs(folder, word_tokenizer):
    write_split(folder, "validation", [*ROWS, {"sentence": "very very good film", "label": 1}])
    splits = prepare_splits(TASKS["sst2"], load(folder), word_tokenizer, max_length=3)
    train, validation = splits["train"].dataset, splits["validation"].dataset
    assert "sentence" not in train.column_names
    # The train split keeps its order, evaluation splits are longest first; no sample is cut twice or lost.
    assert list(train["input_ids"]) == [[2, 4], [3, 4]] * 3
    assert list(validation["input_ids"]) == [[5, 5, 2], [2, 4], [3, 4]]
    assert list(validation["labels"]) == [1, 1, 0]


def test_collator_pads_to_the_longest_of_the_micro_batch(folder, word_tokenizer):
    write_split(folder, "train", [*ROWS, {"sentence": "very very good film", "label": 1}])
    train = prepare_splits(TASKS["sst2"], load(folder), word_tokenizer, max_length=None)["train"].dataset
    batch = TASKS["sst2"].collator(word_tokenizer)([train[0], train[2]])
    assert batch["input_ids"].tolist() == [[2, 4, 0, 0], [5, 5, 2, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("label", [2, -1, None, 1.5])
def test_labels_outside_the_classes_are_refused(folder, word_tokenizer, label):
    write_split(folder, "train", [ROWS[0], {"sentence": "bad", "label": label}])
    with pytest.raises(
        ConfigurationError, match=r"row [01], column 'label': .* is not a class id from 0 to 1"
    ):
        prepare_splits(TASKS["sst2"], load(folder), word_tokenizer, max_length=None)


def test_missing_text_is_refused(folder, word_tokenizer):
    write_split(folder, "train", [ROWS[0], {"sentence": None, "label": 0}])
    with pytest.raises(ConfigurationError, match="row 1, column 'sentence': not a text"):
        prepare_splits(TASKS["sst2"], load(folder), word_tokenizer, max_length=None)


def test_accuracy_and_its_baseline():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    labels = np.array([1, 0, 0, 1])
    assert accuracy(EvalPrediction(predictions=logits, label_ids=labels)) == {"accuracy": 0.5}
    assert accuracy(EvalPrediction(predictions=(logits, logits[::-1]), label_ids=labels)) == {"accuracy": 0.5}
    assert majority_share(datasets.Dataset.from_dict({"labels": [2, 0, 0, 1]})) == 0.5


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "name", sorted(name for name, task in TASKS.items() if task.auto_processor == "AutoTokenizer")
)
def test_one_row_more_or_less_changes_that_sample_alone(name, head, byte_tokenizer):
    """The unit of privacy is a row: preparing must not couple rows."""
    task, tokenizer = TASKS[name], byte_tokenizer
    if head == "label_words":
        if task.label_words is None:
            pytest.skip("a task without label words")
        task, tokenizer = task.label_words, roberta_like_tokenizer()
    texts = ["a b", "a longer text", "x", "the last one of them"]
    rows = [
        {column: text if column != "label" else i % 2 for column in task.columns}
        for i, text in enumerate(texts)
    ]

    def prepared(kept):
        split = task.prepare(datasets.Dataset.from_list(kept), tokenizer, 60).dataset
        return [split[i] for i in range(len(split))]

    everything = prepared(rows)
    assert len(everything) == len(rows)
    for left_out in range(len(rows)):
        assert (
            prepared(rows[:left_out] + rows[left_out + 1 :])
            == everything[:left_out] + everything[left_out + 1 :]
        )
