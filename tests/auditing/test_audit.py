"""Whole audits: correct runs pass, planted faults are seen, reports and the script say so."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from toys import TINY, bert_like_tokenizer
from transformers import BertConfig, BertModel

from auditing.faults import FAULTS, planted
from auditing.table import CORRECT, audited, ranks_contradictions, row_of
from auditing.toy import effort, toy_run
from dp_trainer import ConfigurationError
from dp_trainer.audit.arguments import AuditArguments
from dp_trainer.audit.report import prose, write_report
from dp_trainer.audit.run import audit

pytestmark = pytest.mark.audit
ROOT = Path(__file__).parent.parent.parent
BY_NAME = {fault.name: fault for fault in FAULTS}
# Quick, and still enough for what must be seen below.
QUICK = {"audit_noise_entries": 100_000, "audit_draws": 150, "audit_releases": 120, "audit_step_canaries": 24}


def quick(folder, layers, fault=None, **privacy):
    settings = effort(**QUICK, audit_layers=layers, audit_canaries=300, audit_steps=6)
    with planted(fault):
        return audit(toy_run(folder, unused=5_000, **privacy), settings, quiet=True)


def test_a_correct_run_is_not_contradicted_and_left_alone(tmp_path):
    run = toy_run(tmp_path, unused=5_000)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    report = audit(run, effort(**QUICK, audit_canaries=300, audit_steps=6), quiet=True)
    assert report.contradictions == []
    assert report.verdict.startswith("no contradiction found at ε = 4.")
    assert run.accountant.steps_spent == 0
    assert before.keys() == run.model.state_dict().keys()
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in before.items())
    assert {finding.layer for finding in report.findings} == {"exact", "one_run"}
    assert {bound.layer for bound in report.bounds} == {"step", "one_run"}
    # The attacks do reach something.
    assert all(0 < bound.at_least < bound.claimed for bound in report.bounds)

    files = write_report(report, tmp_path / "report", plot=True)
    record = json.loads(files[0].read_text(encoding="utf-8"))
    assert record["verdict"] == report.verdict
    assert len(record["points"]) == len(report.points) == 11
    assert "no contradiction found" in files[1].read_text(encoding="utf-8")
    assert files[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("σ/√2", ["exact"]),
        ("half of the noise (σ/2)", ["step"]),
        ("no clipping", ["step"]),
        ("no clipping", ["one_run"]),
        ("clipping the batch, not each sample", ["exact"]),
        ("token-mean loss", ["exact"]),
        ("the same noise every step", ["exact"]),
        ("shuffled batches accounted as Poisson", ["exact"]),
        ("every second release counted", ["exact"]),
    ],
)
def test_a_planted_fault_is_seen(tmp_path, name, layers):
    report = quick(tmp_path, layers, BY_NAME[name])
    assert report.layers_that_disagree == set(layers)
    assert report.verdict.startswith("CONTRADICTION: ")
    assert "CONTRADICT" in "\n".join(prose(report))


def test_full_batches_and_flat_clipping_pass(tmp_path):
    privacy = {"sampling": "full_batch", "noise_multiplier": 4.0, "clipping": "flat", "clipping_norm": 0.1}
    assert quick(tmp_path, ["exact", "one_run"], **privacy).contradictions == []


def test_global_clipping_passes(tmp_path):
    report = quick(tmp_path, ["exact", "step"], clipping="global", clipping_norm=1.0, cutoff=2.0)
    assert report.contradictions == []


def test_a_fixed_key_is_named(tmp_path):
    report = quick(tmp_path, ["exact"], insecure_noise_seed=3)
    assert "noise key" in report.verdict


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audit_layers": ["exakt"]}, "must name some of exact, step, one_run"),
        ({"audit_layers": []}, "must name some of"),
        ({"audit_releases": 3}, "audit_releases is 3"),
        ({"audit_false_alarm": 0.5}, "audit_false_alarm"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        AuditArguments(**settings)


def test_too_many_canaries_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="at most 594"):
        audit(toy_run(tmp_path), effort(audit_layers=["one_run"], audit_canaries=595), quiet=True)


@pytest.mark.filterwarnings("ignore:noise_multiplier 0")
def test_a_run_without_noise_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="nothing to refute"):
        audit(toy_run(tmp_path, noise_multiplier=0.0), effort(), quiet=True)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """scripts/audit.py's main on a small configuration; needs the scripts' folder on the path."""
    for name in ("finetune", "audit"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    rows = "\n".join(json.dumps({"sentence": "a good film", "label": i % 2}) for i in range(64))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    tokenizer = bert_like_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 80, **TINY}
    BertModel(BertConfig(pad_token_id=tokenizer.pad_token_id, **sizes)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    settings = {
        "model_name_or_path": str(tmp_path / "tiny"),
        "task": "sst2",
        "data": str(tmp_path),
        "target_epsilon": 8,
        "target_delta": 1e-3,
        "per_device_train_batch_size": 16,
        "max_steps": 3,
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "disable_tqdm": True,
        "audit_layers": ["exact", "step"],
        "audit_noise_entries": 20_000,
        "audit_releases": 60,
        "audit_step_canaries": 16,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    import audit as module

    return lambda *words: module.main(["--config", str(tmp_path / "run.yaml"), *words])


def test_the_script_says_what_it_found(script, tmp_path, capsys):
    assert script() == 0
    assert "no contradiction found at ε = " in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "out" / "audit" / "audit.png").is_file()
    with planted(BY_NAME["half of the noise (σ/2)"]):
        assert script("--audit_layers", "exact", "--plots", "false") == 1
    # Half, give or take four standard errors of so few releases.
    assert re.match(
        r"CONTRADICTION: exact: noise std: 0\.(4[6-9]|5[0-4])", capsys.readouterr().out.splitlines()[-1]
    )


# Everything in docs/audit.md's table; minutes.


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_fault_is_seen_by_the_layers_that_must(fault):
    row = row_of(fault)
    assert row.as_expected, f"expected {row.expected}, seen by {row.seen_by}"


@pytest.mark.slow
@pytest.mark.parametrize("privacy", CORRECT * 5)
def test_correct_runs_raise_no_alarm(privacy):
    assert audited(None, **privacy).contradictions == []


@pytest.mark.slow
@pytest.mark.parametrize("plant", [False, True])
def test_a_noise_key_shared_by_ranks_is_seen(tmp_path, plant):
    found = ranks_contradictions(tmp_path, plant=plant)
    assert ("noise repeats at some distance" in "\n".join(found)) is plant
