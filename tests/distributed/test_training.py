"""Whole runs of ``DPTrainer`` on several processes: equal to one, resumed on another number, and when a rank fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed.launch import launch
from dp_trainer import checkpoints

# Full batches without noise: then runs can be compared to the last digits.
EXACT = {"sampling": "full_batch", "expected_batch_size": None}


def train(folder: Path, name: str, *, processes: int, code: int | None = 0, **settings):
    """Runs ``train.py``; returns what it found, its weights, and how it ended."""
    result = folder / f"{name}.json"
    file = folder / f"{name}-settings.json"
    output_dir = str(settings.pop("output_dir", folder / name))
    file.write_text(json.dumps({"output_dir": output_dir, "result": str(result), **settings}))
    ended = launch("train.py", str(file), processes=processes, timeout=240)
    assert code is None or (ended.code == 0) == (code == 0), ended.output[-3000:]
    if not result.is_file():
        return None, None, ended
    return json.loads(result.read_text()), torch.load(result.with_suffix(".pt")), ended


def distance(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in second)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run on one process."""
    return train(tmp_path_factory.mktemp("alone"), "alone", processes=1, **EXACT)


@pytest.mark.parametrize(
    ("processes", "sharded"),
    [
        (2, False),
        (2, True),
        pytest.param(3, False, marks=pytest.mark.slow),
        pytest.param(3, True, marks=pytest.mark.slow),
    ],
)
def test_weights_and_epsilon_are_those_of_one_process(alone, processes, sharded, tmp_path):
    expected, weights, _ = alone
    found, own, _ = train(tmp_path, "run", processes=processes, sharded=sharded, **EXACT)
    assert distance(own, weights) < 1e-6
    assert found["epsilon"] == expected["epsilon"]
    assert found["steps_spent"] == expected["steps_spent"] == 4
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["type"].startswith("FSDP") == sharded
    assert found["local share"] == pytest.approx(1 / processes if sharded else 1, rel=0.1)


@pytest.mark.slow
def test_epsilon_with_poisson_draws_and_noise(tmp_path):
    settings = {"noise_multiplier": 1.0, "steps": 3}
    one, weights, _ = train(tmp_path, "one", processes=1, **settings)
    two, others, _ = train(tmp_path, "two", processes=2, **settings)
    assert one["epsilon"] == two["epsilon"] > 0
    assert distance(weights, others) > 1e-4, "fresh noise on every run"


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "sharded"), [(1, False), (3, False), (3, True)])
def test_a_run_goes_on_with_another_number_of_processes(alone, processes, sharded, tmp_path):
    """From two: the count goes on, and the weights end where one uninterrupted process's do."""
    _, weights, _ = alone
    folder = tmp_path / "two"
    train(tmp_path, "two", processes=2, sharded=sharded, **EXACT)
    found, own, _ = train(
        tmp_path, "more", processes=processes, sharded=sharded, output_dir=folder,
        resume=str(folder / "checkpoint-2"), **EXACT,
    )  # fmt: skip
    assert found["steps_spent"] == found["global_step"] == 4
    assert distance(own, weights) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("fault", ["a rank raises", "a rank dies"])
def test_when_a_rank_fails_the_others_stop(fault, sharded, tmp_path):
    found, _, ended = train(tmp_path, "run", processes=2, code=1, sharded=sharded, fault=fault, **EXACT)
    assert found is None
    assert ended.code == 1
    assert ended.seconds < 120
    assert ("planted" if fault == "a rank raises" else "Signal 9") in ended.output
    # What was complete before the fault still is.
    checkpoints.check(tmp_path / "run" / "checkpoint-2")


@pytest.mark.slow
def test_sigterm_on_one_rank_saves_and_ends_all(tmp_path):
    found, _, ended = train(
        tmp_path, "run", processes=2, code=1, fault="a rank gets SIGTERM", save_steps=100, steps=6, **EXACT
    )
    assert found is None
    saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert saved in (["checkpoint-3"], ["checkpoint-4"])
    checkpoints.check(tmp_path / "run" / saved[0])
    record = json.loads((tmp_path / "run" / saved[0] / "privacy_record.json").read_text())
    assert record["steps_spent"] == int(saved[0].removeprefix("checkpoint-"))
    assert "SIGTERM" in ended.output or "143" in ended.output


@pytest.mark.slow
def test_out_of_memory_on_one_rank_changes_nothing(alone, tmp_path):
    _, weights, _ = alone
    found, own, _ = train(tmp_path, "run", processes=2, fault="out of memory on one rank", **EXACT)
    assert distance(own, weights) < 1e-6
    assert found["steps_spent"] == 4


@pytest.mark.slow
def test_whole_checkpoints_of_a_sharded_run_and_accelerates_own_checkpointing(tmp_path):
    folder = tmp_path / "two"
    settings = {"state_dict_type": "FULL_STATE_DICT", "checkpoints_activations": True, **EXACT}
    # An optimizer with a state: torch cannot load an empty one into a sharded model.
    settings |= {"sharded": True, "optim": "adamw_torch"}
    _, weights, _ = train(tmp_path, "two", processes=2, **settings)
    assert not list(folder.rglob("*.distcp"))
    saved = load_file(folder / "model" / "model.safetensors")
    named = {name.replace("_checkpoint_wrapped_module.", ""): w for name, w in weights.items()}
    assert distance({name: w.double() for name, w in saved.items()}, named) < 1e-6
    resume = str(folder / "checkpoint-2")
    _, own, _ = train(tmp_path, "more", processes=2, output_dir=folder, resume=resume, **settings)
    assert distance(own, weights) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["masks", "evaluates"])
def test_sharded_runs_with_chance_in_the_collator_or_evaluations(alone, setting, tmp_path):
    expected, weights, _ = alone
    found, own, _ = train(tmp_path, "run", processes=2, sharded=True, **{setting: True}, **EXACT)
    assert found["steps_spent"] == expected["steps_spent"]
    if setting == "evaluates":
        assert distance(own, weights) < 1e-6


@pytest.mark.slow
def test_a_handler_on_one_rank_hangs_nobody(alone, tmp_path):
    _, weights, _ = alone
    _, own, _ = train(tmp_path, "run", processes=2, fault="a handler on one rank", **EXACT)
    assert distance(own, weights) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["ranks have different data", "a rank has another order"])
def test_ranks_with_different_data_are_refused(fault, tmp_path):
    found, _, ended = train(tmp_path, "run", processes=2, code=1, fault=fault, expected_batch_size=20)
    assert found is None
    assert "The ranks of this run disagree" in ended.output
