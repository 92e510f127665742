"""The script end to end, on a tiny model and a few rows."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

SCRIPT = Path(__file__).parent.parent / "scripts" / "finetune.py"
WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "very", "really", "a"]


@pytest.fixture
def workplace(tmp_path):
    """A folder with a tiny model, 64 + 16 rows and a configuration."""
    tokenizer = Tokenizer(
        models.WordLevel(vocab={word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "tiny"
    )
    BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
        )
    ).save_pretrained(tmp_path / "tiny")
    for split, count in (("train", 64), ("validation", 16)):
        rows = [
            {
                "sentence": "a " + "very " * (i % 4) + ("good" if i % 3 else "bad") + " film",
                "label": int(i % 3 > 0),
            }
            for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {
        "model_name_or_path": str(tmp_path / "tiny"),
        "task": "sst2",
        "data": str(tmp_path),
        "target_epsilon": 8,
        "target_delta": 1e-3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path


@pytest.fixture
def run_here(workplace, monkeypatch, capsys):
    """Runs the script in this process; returns its exit code and what it printed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace / "cache")

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--config", str(workplace / "run.yaml"), *words])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return run


def test_private_run_from_another_folder(workplace):
    elsewhere = workplace / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--config", "../run.yaml", "--learning_rate=5e-3"],
        cwd=elsewhere,
        env={
            **os.environ,
            "PYTHONPATH": str(SCRIPT.parent.parent),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(workplace / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = workplace / "out"
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["private"] is True
    assert metrics["settings"]["model_name_or_path"] == "tiny"
    assert str(workplace) not in json.dumps(metrics)
    assert metrics["steps"] == 3
    assert 0 < metrics["epsilon"] <= 8
    assert metrics["delta"] == 1e-3
    assert metrics["splits"]["validation"]["baseline"] == 0.625
    assert (
        f"accuracy {metrics['splits']['validation']['accuracy']:.4f} (best constant answer 0.6250)"
        in done.stdout
    )
    assert "after 3 steps" in done.stdout
    history = json.loads((out / "log_history.json").read_text(encoding="utf-8"))
    assert next(entry["learning_rate"] for entry in history if "learning_rate" in entry) <= 5e-3
    assert json.loads((out / "privacy_statement.json").read_text(encoding="utf-8"))
    assert (out / "privacy_statement.md").read_text(encoding="utf-8").strip() in done.stdout
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    # The model's folder stands alone and holds no loss or evaluation.
    assert AutoModelForSequenceClassification.from_pretrained(out / "model").config.id2label[1] == "positive"
    assert AutoTokenizer.from_pretrained(out / "model")("good")["input_ids"] == [2]
    assert not {"metrics.json", "log_history.json", "trainer_state.json"} & {
        f.name for f in (out / "model").iterdir()
    }


def test_users_are_protected_as_a_whole(workplace, run_here):
    path = workplace / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # 16 patients of four rows each.
    path.write_text(
        "\n".join(json.dumps({**row, "patient": f"p{i % 16}"}) for i, row in enumerate(rows)),
        encoding="utf-8",
    )
    words = ["--privacy_unit", "user", "--user_column", "patient", "--samples_per_user", "2"]
    code, printed = run_here(*words)
    assert code == 0
    assert "N = 16, named by 'patient', at most 2 rows of each a step" in printed.out
    statement = json.loads((workplace / "out" / "privacy_statement.json").read_text(encoding="utf-8"))
    assert statement["unit"].startswith("one user")
    assert (statement["plan"]["dataset_size"], statement["plan"]["samples_per_unit"]) == (16, 2)
    # Ordinary training of the same configuration does not ask for the column.
    assert run_here(*words, "--private", "false")[0] == 0


def test_ordinary_run_claims_no_privacy(workplace, run_here):
    code, printed = run_here("--private", "false", "--plots", "false")
    assert code == 0
    out = workplace / "out"
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8"))["epsilon"] is None
    assert "privacy: none" in printed.out
    assert not list(out.glob("privacy_statement*"))
    assert not (out / "training.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target_epsilom", "8"], "Did you mean '--target_epsilon'?"),
        (["--target_epsilon", "-1"], "target_epsilon"),
        (["--task", "sst3"], "Did you mean 'sst2'?"),
        (["--trainable", "LayerNrom"], "'LayerNorm'"),
        (["--data", "./nowhere"], "no such folder"),
        (["--push_to_hub", "--private", "false"], "upload the folder model/"),
    ],
)
def test_refusals_are_one_line_and_exit_2(run_here, words, message):
    code, printed = run_here(*words)
    assert code == 2
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in printed.err
