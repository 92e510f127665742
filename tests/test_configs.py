"""Every YAML file parses, names its own command and result, and means what its header says."""

import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import TrainingArguments

from dp_trainer.arguments import PrivacyArguments
from dp_trainer.tasks import find_task
from dp_trainer.tasks.arguments import DataArguments, ModelArguments, RunArguments
from dp_trainer.tasks.config import parse_configuration

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
TYPES = (ModelArguments, DataArguments, RunArguments, TrainingArguments, PrivacyArguments)


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request):
    return request.param


def header(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:count])


def test_there_are_configs():
    assert {"sentiment_quickstart", "sst2_minilm"} <= {path.stem for path in CONFIGS}


def test_header_gives_command_and_result(path):
    text = header(path)
    assert f"python scripts/finetune.py --config configs/{path.name}" in text
    # A figure that was measured, or the published one with a plain word that it was not rerun.
    assert re.search(r"Expected: .*\d", text, flags=re.DOTALL)
    assert "measured" in text or "not yet rerun here" in text
    assert "TO BE" not in text


def test_settings_are_understood(path, tmp_path):
    model, data, run, training, privacy = parse_configuration(
        ["--config", str(path), "--output_dir", str(tmp_path)], TYPES
    )
    assert run.private
    assert model.model_name_or_path
    assert find_task(data.task).auto_model
    assert privacy.target_epsilon == 8
    assert privacy.clipping == "automatic"
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    stated = re.search(r"expected logical batch (\d+) × (\d+) = (\d+)", path.read_text(encoding="utf-8"))
    assert [int(number) for number in stated.groups()] == [
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        batch,
    ]


def test_results_stay_in_the_ignored_folder(path):
    _, _, _, training, _ = parse_configuration(["--config", str(path)], TYPES)
    assert training.output_dir == f"runs/{path.stem}"


LAUNCH = sorted((Path(__file__).parent.parent / "configs" / "accelerate").glob("*.yaml"))


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
