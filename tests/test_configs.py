"""Every YAML file parses, says its command and result, and runs two steps on a toy model with the true tokenizer."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from config_plans import CONFIGS, header, page, read
from config_toys import EXPECTED, data_folder, kind_of, model_folder

from dp_trainer.tasks import find_task
from dp_trainer.tasks.comparison import read_run

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "finetune.py"
STEM = re.compile(
    r"(?P<task>image_folder|[a-z0-9]+)_(?P<model>[\w-]+?)_(eps(?P<epsilon>\d+)|(?P<none>nonprivate))(_\w+)?"
)


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_the_rows_that_people_look_for_are_there():
    stems = {path.stem for path in CONFIGS}
    wanted = {f"e2e_{model}_eps{e}" for model in ("gpt2", "gpt2-medium", "gpt2-large") for e in (3, 8)}
    for task in ("sst2", "mnli", "qnli", "qqp"):
        wanted |= {f"{task}_roberta-{size}_eps{e}" for size in ("base", "large") for e in (3, 8)}
        wanted |= {f"{task}_roberta-large_eps{e}_{clip}" for clip in ("abadi", "autov") for e in (3, 8)}
        wanted |= {f"{task}_roberta-large_nonprivate", f"{task}_roberta-base_eps8_lora"}
    assert wanted <= stems


def test_header_gives_command_and_result(path):
    text = header(path)
    assert f"python scripts/finetune.py --config configs/{path.name}" in text
    # A figure that was measured, or the published one with a plain word that it was not rerun.
    assert re.search(r"Expected: .*\d", text)
    assert "measured" in text or "not yet rerun here" in text
    assert "TO BE" not in text


def test_settings_are_what_name_and_header_say(path):
    settings = read(path)
    assert find_task(settings.data.task, head=settings.model.head).auto_model
    assert settings.training.output_dir == f"runs/{path.stem}"
    named = STEM.fullmatch(path.stem)
    if named:
        assert settings.run.private == (named["none"] is None)
        assert settings.data.task == named["task"]
        if settings.run.private:
            assert settings.privacy.target_epsilon == int(named["epsilon"])
    else:
        assert path.stem == "sentiment_quickstart"
    kinds = {"abadi": "flat", "autov": "normalizing", "global": "global"}
    assert settings.privacy.clipping == kinds.get(path.stem.rpartition("_")[2], "automatic")
    # δ below one over twice the number of samples, as the source.
    assert settings.privacy.target_delta <= 1 / (1.9 * settings.dataset_size)
    training = settings.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    stated = re.search(r"expected logical batch (\d+) × (\d+) = (\d+)", path.read_text(encoding="utf-8"))
    assert [int(number) for number in stated.groups()] == [
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        batch,
    ]
    assert settings.expected_batch_size == batch


@pytest.mark.slow
def test_the_page_of_plans_is_that_of_these_configs():
    assert (ROOT / "docs" / "configs.md").read_text(encoding="utf-8") == page()


def test_the_page_of_plans_has_every_config_with_its_size_batch_and_steps():
    text = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[([\w-]+)\]\S+ \| (.*) \|$", text, flags=re.MULTILINE))
    assert set(rows) == {path.stem for path in CONFIGS}
    for path in CONFIGS:
        settings = read(path)
        kind, size, batch, _, steps, *_ = rows[path.stem].split(" | ")
        assert (size, batch, steps.strip()) == (
            f"{settings.dataset_size:,}",
            f"{settings.expected_batch_size:,}",
            f"{settings.steps:,}",
        )
        assert kind == (settings.privacy.clipping if settings.run.private else "none")


def first_of_each():
    """Configs that show every task and head of a model, and every way of training it, once; the others are slow."""
    seen, firsts = set(), set()
    for path in CONFIGS:
        settings = read(path)
        kind = kind_of(settings.model.model_name_or_path)
        adapted = (settings.model.lora_rank is not None, settings.model.trainable is not None)
        news = {
            (kind, settings.data.task, settings.model.head),
            (kind, settings.privacy.clipping, settings.run.private, *adapted),
        }
        if news - seen:
            firsts.add(path)
        seen |= news
    return firsts


FIRSTS = first_of_each()


# peft 0.21 asks transformers 5.23 by a deprecated name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=() if p in FIRSTS else pytest.mark.slow) for p in CONFIGS],
)
def test_it_runs_two_steps_on_a_toy_model_with_the_true_tokenizer(
    path, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    settings = read(path)
    root = tmp_path_factory.getbasetemp() / "config_toys"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    kind, model = model_folder(root, settings.model.model_name_or_path)
    words = {
        "model_name_or_path": model,
        "data": data_folder(root, settings.data.task),
        "output_dir": str(tmp_path / path.stem),
        "use_cpu": "true",
        "max_steps": 2,
        "target_delta": "1e-3",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "certificate_samples": 2,
        # Quicker to calibrate with; the plans of docs/configs.md are by PLD.
        "accountant": "rdp",
        "max_eval_samples": 4,
        "max_generated": 2,
        "num_beams": 2,
        "max_new_tokens": 6,
        "plots": "false",
        "report_to": "none",
        "disable_tqdm": "true",
        "save_strategy": "no",
        "dataloader_pin_memory": "false",
    }
    if settings.privacy.expected_batch_size:
        words["expected_batch_size"] = 8
    if settings.model.lora_target_modules:
        words["lora_target_modules"] = EXPECTED[kind].lora_target_modules
    argv = [str(SCRIPT), "--config", str(path)]
    for key, value in words.items():
        argv += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        pytest.fail(f"ended with {end.code}: {capsys.readouterr().err}")
    run = read_run(tmp_path / path.stem)
    validation = find_task(settings.data.task, head=settings.model.head).validation_split
    assert run.metrics["splits"][validation]
    assert run.metrics["settings"]["task"] == settings.data.task
    assert ("bleu" in run.metrics["splits"].get("test", {})) == (settings.data.task == "e2e")
    if settings.run.private:
        assert run.metrics["steps"] == 2
        assert 0 < run.metrics["epsilon"] <= settings.privacy.target_epsilon
        assert run.statement["plan"]["clipping"]["name"] == settings.privacy.clipping
        assert run.statement["plan"]["expected_batch_size"] == 8
    else:
        assert run.statement is None


LAUNCH = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_launch_files_are_what_accelerate_reads(path):
    config = load_config_from_file(str(path))
    assert config.num_processes > 1
    assert config.mixed_precision == "no", "precision belongs to the run's own config"
    assert f"accelerate launch --config_file configs/accelerate/{path.name}" in header(path)
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert not config.fsdp_config["fsdp_offload_params"]


def test_the_slurm_script_is_valid_and_uses_an_existing_launch_file():
    script = LAUNCH[0].parent / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    used = set(re.findall(r"configs/accelerate/(\w+\.yaml)", text))
    assert used == {"several_machines.yaml"}
    assert used <= {path.name for path in LAUNCH}
