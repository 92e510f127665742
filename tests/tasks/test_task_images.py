"""Images in class folders: loading, what is refused, and whole runs on a toy ViT."""

import json
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import reference
import torch
import yaml
from PIL import Image
from toys import CLASSES, draw
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from dp_trainer import FlatClipping, clipped_gradient_sum
from dp_trainer.errors import ConfigurationError
from dp_trainer.losses import per_sample_loss_for
from dp_trainer.tasks import TASKS
from dp_trainer.tasks.arguments import DataArguments, ModelArguments
from dp_trainer.tasks.images import ImageSamples, stack_images, with_classes
from dp_trainer.tasks.loading import load_rows, prepare_splits
from dp_trainer.tasks.models import load_model, load_processor

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"
TASK = TASKS["image_folder"]
PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})


@pytest.fixture
def folder(tmp_path):
    draw(tmp_path / "data", "train")
    draw(tmp_path / "data", "validation", count=2)
    return tmp_path / "data"


@pytest.fixture
def model_folder(tmp_path):
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=5)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    PROCESSOR.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def load(folder, **settings):
    return load_rows(TASK, DataArguments(task="image_folder", data=str(folder), **settings))


def test_folders_give_classes_and_samples(folder):
    draw(folder, "test", count=1, classes=CLASSES[:2], mode="L")
    rows = load(folder)
    assert {name: len(split) for name, split in rows.items()} == {"train": 12, "validation": 6, "test": 2}
    task = with_classes(TASK, rows)
    assert task.labels == CLASSES
    splits = prepare_splits(task, rows, PROCESSOR, max_length=None)
    for name, split in splits.items():
        for i in range(len(split.dataset)):
            sample = split.dataset[i]
            assert sample["pixel_values"].shape == (3, 8, 8)
            assert sample["labels"] == split.dataset.labels[i]
            # The picture's brightest channel tells its class; a grey one has three alike.
            channels = sample["pixel_values"].mean((1, 2))
            assert (
                (channels.argmax() == sample["labels"])
                if name != "test"
                else bool((channels == channels[0]).all())
            )
    assert splits["train"].dataset.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert task.baseline(splits["validation"].dataset) == pytest.approx(1 / 3)


def test_test_stands_in_for_a_missing_validation_split(folder):
    (folder / "validation").rename(folder / "test")
    rows = load(folder)
    assert {name: len(split) for name, split in rows.items()} == {"train": 12, "validation": 6}


def test_a_task_that_evaluates_on_test_reads_folders_too(folder):
    (folder / "validation").rename(folder / "test")
    rows = load_rows(TASKS["cifar10"], DataArguments(task="cifar10", data=str(folder)))
    assert {name: len(split) for name, split in rows.items()} == {"train": 12, "test": 6}


def test_cifar10_comes_from_the_hub_with_our_names(monkeypatch):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    picture = Image.new("RGB", (4, 4))
    split = datasets.Dataset.from_dict({"img": [picture] * 3, "label": [0, 1, 2]}, features=features)
    asked = []

    def hub(*names, **_):
        asked.append(names)
        return {"train": split, "test": split}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    rows = load_rows(TASKS["cifar10"], DataArguments(task="cifar10"))
    assert asked == [("uoft-cs/cifar10", None)]
    task = with_classes(TASKS["cifar10"], rows)
    assert task.labels == CLASSES
    sample = prepare_splits(task, rows, PROCESSOR, max_length=None)["train"].dataset[2]
    assert (sample["pixel_values"].shape, sample["labels"]) == ((3, 8, 8), 2)


def remove_class(folder):
    (folder / "validation" / "fox").mkdir()


def remove_classes(folder):
    for name in CLASSES:
        for file in (folder / "train" / name).iterdir():
            file.unlink()
        (folder / "train" / name).rmdir()


def remove_images(folder):
    for split in ("train", "validation"):
        for file in (folder / split).glob("*/*"):
            file.unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda f: (f / "train").rename(f / "training"),
            "no folder 'train'; it holds 'training', 'validation'",
        ),
        (lambda f: (f / "validation").rename(f / "dev"), "no folder 'validation'; it holds 'dev', 'train'"),
        (remove_class, "class folders 'cat', 'dog', 'eel', 'fox', and 'train' has 'cat', 'dog', 'eel'"),
        (remove_classes, "has the class folders none"),
        (remove_images, "not readable as images"),
    ],
    ids=["no train", "no validation", "a class of its own", "no classes", "no images"],
)
def test_folders_of_another_form_are_refused(folder, harm, message):
    harm(folder)
    with pytest.raises(ConfigurationError, match=message):
        load(folder)


def test_a_folder_must_be_given():
    with pytest.raises(ConfigurationError, match=r"has no data of its own. Give data=<folder>"):
        load_rows(TASK, DataArguments(task="image_folder"))


def test_a_length_means_nothing_to_images(folder):
    rows = load(folder)
    with pytest.raises(
        ConfigurationError, match="max_length=9: inputs of task 'image_folder' have no length"
    ):
        prepare_splits(with_classes(TASK, rows), rows, PROCESSOR, max_length=9)


def test_a_broken_image_is_named(folder):
    (folder / "train" / "cat" / "1.png").write_bytes(b"no picture")
    samples = ImageSamples(load(folder)["train"], PROCESSOR)
    assert samples[0]["labels"] == 0
    with pytest.raises(ConfigurationError, match="row 1, column 'image': not readable"):
        samples[1]


def table(names, label=0, *, images=True):
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    rows = {"image": [Image.new("RGB", (4, 4))] if images else ["a.png"], "label": [label]}
    features = {"image": datasets.Image() if images else datasets.Value("string"), "label": kind}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.mark.parametrize(
    ("train", "validation"), [(None, None), (["a", "b"], ["b", "a"]), (["a", "b"], ["a"]), (["a", "b"], None)]
)
def test_classes_must_be_named_and_alike(train, validation):
    with pytest.raises(ConfigurationError, match="each split must name the same classes"):
        with_classes(TASK, {"train": table(train), "validation": table(validation)})


def test_unlabelled_rows_and_other_columns_are_refused():
    with pytest.raises(ConfigurationError, match="row 0, column 'label': -1 is not a class id from 0 to 1"):
        TASK.prepare(table(["a", "b"], -1), PROCESSOR, 0)
    with pytest.raises(ConfigurationError, match=r"not images. Cast it to datasets.Image\(\)"):
        TASK.prepare(table(["a", "b"], images=False), PROCESSOR, 0)


def test_images_of_unequal_sizes_are_refused():
    samples = [{"pixel_values": torch.zeros(3, size, 4), "labels": 0} for size in (4, 5)]
    with pytest.raises(ConfigurationError, match=r"sizes \[\(3, 4, 4\), \(3, 5, 4\)\]"):
        stack_images(samples)
    assert stack_images(samples[:1] * 2)["pixel_values"].shape == (2, 3, 4, 4)


def test_a_head_for_other_classes_starts_anew_and_the_body_stays(folder, model_folder):
    arguments = ModelArguments(model_name_or_path=str(model_folder))
    task = with_classes(TASK, load(folder))
    model = load_model(task, arguments, load_processor(task, arguments))
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.classifier.weight.shape == (3, 8)
    before = ViTForImageClassification.from_pretrained(model_folder).vit.state_dict()
    torch.testing.assert_close(dict(model.vit.state_dict()), dict(before))


def test_a_body_of_another_shape_is_refused(folder, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"image_size": 16}))
    arguments = ModelArguments(model_name_or_path=str(model_folder))
    with pytest.raises(ConfigurationError, match=r"'vit\.embeddings\.position_embeddings' of the checkpoint"):
        load_model(with_classes(TASK, load(folder)), arguments, PROCESSOR)


# peft 0.21 asks transformers 5.23 by a deprecated name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_come_with_the_new_head(folder, model_folder):
    pytest.importorskip("peft")
    arguments = ModelArguments(
        model_name_or_path=str(model_folder), lora_rank=2, lora_target_modules=["q_proj"]
    )
    rows = load(folder)
    task = with_classes(TASK, rows)
    model = load_model(task, arguments, PROCESSOR)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("classifier" in name for name in training)
    assert all("lora_" in name or "classifier" in name for name in training)
    samples = prepare_splits(task, rows, PROCESSOR, max_length=None)["train"].dataset
    losses = per_sample_loss_for(model)(model, stack_images([samples[0], samples[5]]))
    assert losses.shape == (2,)


def test_a_processor_that_cannot_be_read_is_refused(model_folder, monkeypatch):
    arguments = ModelArguments(model_name_or_path=str(model_folder))

    def lacking(*_, **__):
        raise ImportError("\nFancyImageProcessor requires the Torchvision library but it was not found.")

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", lacking)
    with pytest.raises(ConfigurationError, match=r"requires the Torchvision .* pip install torchvision"):
        load_processor(TASK, arguments)
    monkeypatch.undo()
    (model_folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_processor(TASK, arguments)


def test_norms_and_clipped_sum_agree_with_one_image_at_a_time(folder, model_folder):
    arguments = ModelArguments(model_name_or_path=str(model_folder))
    rows = load(folder)
    task = with_classes(TASK, rows)
    model = load_model(task, arguments, PROCESSOR).double()
    samples = prepare_splits(task, rows, PROCESSOR, max_length=None)["train"].dataset
    micro_batch = task.collator(PROCESSOR)([samples[i] for i in (0, 3, 5, 9, 11)])
    micro_batch["pixel_values"] = micro_batch["pixel_values"].double()
    loss = per_sample_loss_for(model)
    expected = reference.per_sample_gradients(model, micro_batch, loss)
    norms = reference.norms(expected)
    clipping = FlatClipping(float(norms.median()) * 1.01)
    actual = clipped_gradient_sum(model, [micro_batch], per_sample_loss=loss, clipping=clipping)
    torch.testing.assert_close(actual.norms.double(), norms, rtol=1e-10, atol=0)
    assert 0 < int((actual.factors < 0.999).sum()) < len(expected)
    assert reference.distance(actual.gradients, reference.clipped_sum(expected, actual.factors)) < 1e-10


def test_the_plain_trainer_keeps_the_images(folder, model_folder, tmp_path):
    """The Trainer drops columns that the model does not take, and ours must not be among them."""
    arguments = ModelArguments(model_name_or_path=str(model_folder))
    rows = load(folder)
    task = with_classes(TASK, rows)
    splits = prepare_splits(task, rows, PROCESSOR, max_length=None)
    trainer = Trainer(
        model=load_model(task, arguments, PROCESSOR),
        args=TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[], disable_tqdm=True),
        data_collator=task.collator(PROCESSOR),
        eval_dataset=splits["validation"].dataset,
        compute_metrics=task.compute_metrics,
    )
    assert trainer.args.remove_unused_columns
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


@pytest.mark.parametrize("private", [True, False], ids=["private", "ordinary"])
def test_two_steps_through_the_script(folder, model_folder, tmp_path, monkeypatch, capsys, private):
    settings = {
        "model_name_or_path": str(model_folder),
        "task": "image_folder",
        "data": str(folder),
        "private": private,
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "plots": False,
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--config", str(tmp_path / "run.yaml")])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        pytest.fail(f"exit {end.code}: {capsys.readouterr().err}")
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["splits"]["validation"]["baseline"] == pytest.approx(1 / 3)
    assert metrics["steps"] == 2
    saved = AutoModelForImageClassification.from_pretrained(out / "model")
    assert saved.config.id2label == dict(enumerate(CLASSES))
    assert AutoImageProcessor.from_pretrained(out / "model").size["height"] == 8
