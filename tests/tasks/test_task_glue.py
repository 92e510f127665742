"""GLUE's tasks: their rows, metrics and names, and whole runs with either head."""

import json
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from sklearn.metrics import f1_score
from toys import (
    COLUMNS,
    SHARED,
    bert_like_tokenizer,
    masked_model,
    roberta_like_tokenizer,
    rows_of,
    write_rows,
)
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    EvalPrediction,
)

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks import TASKS, find_task
from dp_trainer.tasks.arguments import HEADS, DataArguments, ModelArguments
from dp_trainer.tasks.classification import accuracy_and_f1
from dp_trainer.tasks.loading import load_rows, prepare_splits

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"
CLASSES = {
    "sst2": ("negative", "positive"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_columns_and_classes_are_glues(name):
    task = TASKS[name]
    assert task.columns == (*COLUMNS[name], "label")
    assert task.labels == task.label_words.labels == CLASSES[name]
    assert (task.source.repository, task.source.configuration) == ("nyu-mll/glue", name)


@pytest.mark.parametrize("name", ["mnli", "qnli", "qqp"])
@pytest.mark.parametrize("head", HEADS)
def test_real_rows_become_inputs(name, head):
    """The first rows of the real files, where they are beside the repository."""
    if not (SHARED / name).is_dir():
        pytest.skip("the shared data is not here")
    task = find_task(name, head=head)
    rows = load_rows(
        task,
        DataArguments(task=name, data=str(SHARED / name), max_train_samples=20, max_eval_samples=20),
    )
    assert set(rows) == {"train", task.validation_split}
    tokenizer = bert_like_tokenizer()
    splits = prepare_splits(task, rows, tokenizer, max_length=40)
    for split in splits.values():
        assert len(split.dataset) == 20
        assert set(split.dataset["labels"]) <= set(range(len(task.labels)))
        assert max(map(len, split.dataset["input_ids"])) == 40
    if head == "classification":
        # Both texts of the pair are there: two separators.
        assert all(ids.count(tokenizer.sep_token_id) == 2 for ids in splits["train"].dataset["input_ids"])


def test_mnli_evaluates_both_of_its_validation_splits(tmp_path):
    for split in ("train", "validation_matched", "validation_mismatched"):
        write_rows(tmp_path, split, rows_of("mnli", 6, classes=3))
    rows = load_rows(TASKS["mnli"], DataArguments(task="mnli", data=str(tmp_path)))
    assert list(rows) == ["train", "validation_matched", "validation_mismatched"]
    (tmp_path / "validation_matched.jsonl").unlink()
    with pytest.raises(ConfigurationError, match="no file for split 'validation_matched'"):
        load_rows(TASKS["mnli"], DataArguments(task="mnli", data=str(tmp_path)))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": -1}, r"row 1, column 'label': -1 is not a class id from 0 to 2; GLUE writes -1"),
        ({"label": 3}, "row 1, column 'label': 3 is not a class id from 0 to 2. Give"),
        ({"label": None}, "row 1, column 'label': None is not a class id"),
        ({"hypothesis": None}, "row 1, column 'hypothesis': not a text"),
    ],
)
def test_unfit_rows_are_refused(head, change, message):
    rows = rows_of("mnli", 3, classes=3)
    rows[1] |= change
    with pytest.raises(ConfigurationError, match=message):
        find_task("mnli", head=head).prepare(datasets.Dataset.from_list(rows), bert_like_tokenizer(), 64)


def test_classes_in_another_order_are_refused():
    names = ["contradiction", "entailment", "neutral"]
    rows = datasets.Dataset.from_list(rows_of("mnli", 3, classes=3))
    rows = rows.cast_column("label", datasets.ClassLabel(names=names))
    with pytest.raises(ConfigurationError, match=r"the data numbers the classes .*Renumber the labels"):
        TASKS["mnli"].prepare(rows, bert_like_tokenizer(), 64)
    in_order = rows.cast_column("label", datasets.ClassLabel(names=list(CLASSES["mnli"])))
    assert len(TASKS["mnli"].prepare(in_order, bert_like_tokenizer(), 64).dataset) == 3


def test_wrong_columns_name_the_nearest(tmp_path):
    rows = [{"question_1": "a", "question2": "b", "label": 0}]
    for split in ("train", "validation"):
        write_rows(tmp_path, split, rows)
    with pytest.raises(ConfigurationError, match=r"no column 'question1'.*the nearest is 'question_1'"):
        load_rows(TASKS["qqp"], DataArguments(task="qqp", data=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("mnlo", "classification", "Did you mean 'mnli'"),
        ("qpq", "label_words", "Did you mean 'qqp'"),
        (
            "e2e",
            "label_words",
            "task 'e2e' has no label words; 'mnli', 'qnli', 'qqp', 'sentiment', 'sst2' have",
        ),
        ("image_folder", "label_words", "task 'image_folder' has no label words"),
        ("mnli", "label_word", "Did you mean 'label_words'"),
    ],
)
def test_unknown_tasks_and_heads_name_the_nearest(name, head, message):
    with pytest.raises(ConfigurationError, match=message):
        find_task(name, head=head)


def test_unknown_heads_are_refused_in_the_settings():
    with pytest.raises(ConfigurationError, match="must be one of classification, label_words"):
        ModelArguments(model_name_or_path="owner/name", head="words")


@pytest.mark.parametrize("answers", [[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
def test_f1_is_that_of_scikit_learn(answers, labels):
    logits = np.eye(2)[answers] * 3 - 1
    metrics = accuracy_and_f1(EvalPrediction(predictions=logits, label_ids=np.array(labels)))
    assert metrics["f1"] == pytest.approx(f1_score(labels, answers, zero_division=0))
    assert metrics["accuracy"] == np.mean(np.array(answers) == np.array(labels))


@pytest.fixture
def run_script(tmp_path, monkeypatch, capsys):
    """Runs two steps of the script on rows and a model in the test's folder; returns its output folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(name, tokenizer, model, **settings):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        task = find_task(name)
        for split in ("train", *task.evaluation_splits):
            count = 24 if split == "train" else 9
            write_rows(tmp_path / "data", split, rows_of(name, count, classes=len(task.labels)))
        settings = {
            "model_name_or_path": str(tmp_path / "model"),
            "task": name,
            "data": str(tmp_path / "data"),
            "max_length": 24,
            # Given and not searched for: the search would be most of the test's time.
            "noise_multiplier": 1.0,
            "target_delta": 1e-3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "plots": False,
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **settings,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--config", str(tmp_path / "run.yaml")])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            pytest.fail(f"exit {end.code}: {capsys.readouterr().err}")
        return tmp_path / "out"

    return run


@pytest.mark.parametrize(
    ("name", "head", "private"),
    [
        *((name, head, True) for name in CLASSES for head in HEADS),
        ("mnli", "label_words", False),
        ("qqp", "classification", False),
    ],
)
def test_two_steps_through_the_script(run_script, name, head, private):
    tokenizer = roberta_like_tokenizer() if name in ("sst2", "mnli") else bert_like_tokenizer()
    model = masked_model("roberta" if name in ("sst2", "mnli") else "bert", tokenizer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    out = run_script(name, tokenizer, model, head=head, private=private)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    task = find_task(name)
    assert set(metrics["splits"]) == set(task.evaluation_splits)
    for split in metrics["splits"].values():
        assert split["accuracy"] * 9 == pytest.approx(round(split["accuracy"] * 9))
        assert ("f1" in split) == (name == "qqp")
        # A loss over a whole vocabulary would be near log V > 3.
        assert 0 < split["loss"] < 2
    assert metrics["steps"] == 2
    assert metrics["private"] is private
    kind = AutoModelForMaskedLM if head == "label_words" else AutoModelForSequenceClassification
    saved, info = kind.from_pretrained(out / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert saved.config.id2label == dict(enumerate(task.labels))
    table = saved.get_input_embeddings().weight
    assert not table.equal(before[next(key for key in before if key.endswith("word_embeddings.weight"))])
    if head == "label_words":
        assert saved.get_output_embeddings().weight is table


def test_label_smoothing_reaches_the_loss_of_label_words(run_script):
    tokenizer = bert_like_tokenizer()
    model = masked_model("bert", tokenizer)
    smoothed = {}
    for smoothing in (0.0, 0.9):
        out = run_script(
            "qnli", tokenizer, model, head="label_words", private=False, learning_rate=1e-9,
            label_smoothing_factor=smoothing,
        )  # fmt: skip
        smoothed[smoothing] = json.loads((out / "metrics.json").read_text())["splits"]["validation"]["loss"]
    assert smoothed[0.0] != pytest.approx(smoothed[0.9], rel=1e-4)
