"""Checkpoints that are whole or say that they are not, and what a user reads when one cannot be used or made."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from faults.child import build_model, build_trainer, rows
from torch import distributed, nn

from dp_trainer import ConfigurationError, DPTrainer, PrivacyBudgetError, RunFaultError, checkpoints, records


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    build_trainer(folder, thorough=True, max_steps=4).train()
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    return folder


@pytest.fixture
def heard(caplog):
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers.logging.disable_propagation()
    transformers.logging.set_verbosity_error()


def resume(folder: Path, wanted: str | bool = True, **changes) -> DPTrainer:
    run = build_trainer(folder, **{"max_steps": 4, **changes})
    run.train(resume_from_checkpoint=wanted)
    return run


def manifest(folder: Path) -> dict:
    return json.loads((folder / checkpoints.MANIFEST_NAME).read_text())


# What a complete one holds.


def test_a_checkpoint_lists_all_its_files(trained):
    folder = trained / "checkpoint-2"
    checkpoints.check(folder)
    held = {path.name for path in folder.iterdir()} - {checkpoints.MANIFEST_NAME}
    assert set(manifest(folder)["files"]) == held
    assert {
        *("privacy_record.json", "privacy_statement.json", "privacy_statement.md", "trainer_state.json"),
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    } <= held
    assert not list(trained.rglob("*.bin.index*")) + list(trained.rglob("pytorch_model*"))
    record = json.loads((folder / "privacy_record.json").read_text())
    assert record["steps_spent"] == 2
    assert record["plan"]["noise_multiplier"] == 1.0
    statement = json.loads((folder / "privacy_statement.json").read_text())
    assert statement["steps"] == 2
    assert statement["certificate"]["samples"] == 2


def test_the_saved_generators_are_only_the_global_ones(trained):
    state = torch.load(trained / "checkpoint-2" / "rng_state.pth", weights_only=False)
    assert set(state) - {"cuda"} == {"python", "numpy", "cpu"}
    # Two runs that resume from the same state draw noise of their own.
    ends = []
    for _ in range(2):
        run = build_trainer(trained.parent / "elsewhere", max_steps=4, save_strategy="no", learning_rate=1e-2)
        run.train(resume_from_checkpoint=str(trained / "checkpoint-2"))
        ends.append(run.model.classifier.weight.detach().clone())
    assert not torch.equal(*ends)


# What cannot be used.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "weights truncated": (lambda f: cut(f / "model.safetensors"), r"model\.safetensors: damaged, it has .* bytes"),
    "weights altered": (lambda f: flip(f / "model.safetensors"), r"model\.safetensors: damaged, its checksum"),
    "optimizer missing": (lambda f: (f / "optimizer.pt").unlink(), r"optimizer\.pt: missing"),
    "record truncated": (lambda f: cut(f / "privacy_record.json"), r"privacy_record\.json: damaged"),
    "record missing": (lambda f: (f / "privacy_record.json").unlink(), r"privacy_record\.json: missing"),
    "state truncated": (lambda f: cut(f / "trainer_state.json"), r"trainer_state\.json: damaged"),
    "manifest truncated": (lambda f: cut(f / checkpoints.MANIFEST_NAME), r"manifest\.json: damaged"),
    "manifest without the record": (
        lambda f: (f / checkpoints.MANIFEST_NAME).write_text('{"version": 1, "files": {}}'),
        r"privacy_record\.json: not among the files",
    ),
    "manifest of another version": (
        lambda f: (f / checkpoints.MANIFEST_NAME).write_text('{"version": 2, "files": {}}'),
        "version 2",
    ),
    "cut short": (lambda f: checkpoints._write_manifest(f, None), "incomplete, its save was cut short"),
    "empty": (empty, "empty folder"),
    "former format": (lambda f: (f / checkpoints.MANIFEST_NAME).unlink(), r"Versions before .* wrote none.*finish"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_by_true(copied, heard, damage):
    spoil, message = DAMAGES[damage]
    spoil(copied / "checkpoint-4")
    run = build_trainer(copied, max_steps=4)
    with pytest.raises(ConfigurationError, match=message) as refused:
        run.train(resume_from_checkpoint=str(copied / "checkpoint-4"))
    assert "checkpoint-4" in str(refused.value)
    assert "esume" in str(refused.value)
    assert run.accountant.steps_spent == 0
    run.train(resume_from_checkpoint=True)
    assert run.accountant.steps_spent == run.state.global_step == 4
    assert "Skipped a checkpoint" in heard.text
    assert "checkpoint-4" in heard.text


def test_without_any_complete_checkpoint_true_says_so(copied, tmp_path):
    for folder in copied.iterdir():
        empty(folder)
    with pytest.raises(ConfigurationError, match="no complete checkpoint"):
        resume(copied)
    with pytest.raises(ConfigurationError, match="no complete checkpoint"):
        resume(tmp_path / "nowhere")


def test_a_checkpoint_of_the_former_format_is_usable_once_it_is_listed(copied):
    (copied / "checkpoint-4" / checkpoints.MANIFEST_NAME).unlink()
    (copied / "checkpoint-2" / checkpoints.MANIFEST_NAME).unlink()
    checkpoints.finish(copied / "checkpoint-2")
    assert resume(copied, str(copied / "checkpoint-2")).accountant.steps_spent == 4
    (copied / "checkpoint-2" / "privacy_record.json").unlink()
    with pytest.raises(ConfigurationError, match=r"privacy_record\.json: missing"):
        checkpoints.finish(copied / "checkpoint-2")


def test_a_finished_run_is_not_trained_further(copied):
    with pytest.raises(PrivacyBudgetError, match="spent"):
        resume(copied)


@pytest.mark.parametrize("samples", [63, 65])
def test_a_dataset_of_another_length_is_refused_with_both_lengths(copied, samples):
    data = [*rows(), *rows()][:samples]
    with pytest.raises(ConfigurationError, match=f"dataset_size was 64, is {samples}"):
        resume(copied, str(copied / "checkpoint-2"), data=data)


def test_damage_between_the_pieces_of_a_large_file_is_out_of_reach_but_truncation_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoints, "_PIECE", 16)
    path = tmp_path / "large"
    path.write_bytes(bytes(16 * 64 * 4))
    listed = checkpoints._describe(path)
    assert not listed["whole"]
    cut(path)
    with pytest.raises(ConfigurationError, match="bytes"):
        checkpoints._check_file(path, listed)
    path.write_bytes(bytes(16 * 64 * 4 - 1) + b"x")
    with pytest.raises(ConfigurationError, match="checksum"):
        checkpoints._check_file(path, listed)


# When it becomes complete, and when older ones go.


def test_it_is_complete_last_and_older_ones_go_only_then(tmp_path, monkeypatch):
    seen = []

    def look(name):
        complete = [p.name for p in sorted(tmp_path.glob("checkpoint-*")) if checkpoints._is_listed(p)]
        seen.append((name, complete))

    def before(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (look(name), original(*a, **k))[1])

    run = build_trainer(tmp_path, max_steps=4, save_total_limit=1)
    for name in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
        before(run, name)
    for name in ("finish", "_rotate"):
        before(checkpoints, name)
    run.train()
    look("end")
    second = seen[5:]
    assert [name for name, _ in second[:-2]] == [name for name, _ in seen[:4]]
    assert all(complete == ["checkpoint-2"] for _, complete in second[:-2])
    assert second[-2:] == [("_rotate", ["checkpoint-2", "checkpoint-4"]), ("end", ["checkpoint-4"])]
    assert run.args.save_total_limit == 1


def test_rotation_never_deletes_the_newest_complete_one(tmp_path):
    """By step numbers alone, the incomplete checkpoint 7 would count as the newest, and 4 and 6 go."""
    for step in (4, 6, 7, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        checkpoints._write_manifest(folder, {} if step < 7 else None)
    checkpoints._rotate(tmp_path / "checkpoint-6", limit=2, best=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    checkpoints._rotate(tmp_path / "checkpoint-6", limit=1, best=str(tmp_path / "checkpoint-4"))
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints._rotate(tmp_path / "checkpoint-6", limit=None, best=None)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_written_again_keeps_nothing_of_the_former_save(copied):
    (copied / "checkpoint-4" / "model-00009-of-00009.safetensors").write_bytes(b"left over")
    resume(copied, str(copied / "checkpoint-2"))
    assert not (copied / "checkpoint-4" / "model-00009-of-00009.safetensors").exists()
    checkpoints.check(copied / "checkpoint-4")


def test_the_same_step_saved_again_never_leaves_the_run_without_a_complete_one(copied, monkeypatch):
    """The complete checkpoint of that step may be the only one."""
    former = (copied / "checkpoint-4" / "model.safetensors").read_bytes()
    run = build_trainer(copied, max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "finish", full)
        with pytest.raises(RunFaultError, match=r"checkpoint-4\.former is complete"):
            run.train(resume_from_checkpoint=str(copied / "checkpoint-2"))
    shutil.rmtree(copied / "checkpoint-2")
    assert checkpoints.newest_complete(copied) == copied / "checkpoint-4.former"
    assert (copied / "checkpoint-4.former" / "model.safetensors").read_bytes() == former
    # Going on from it makes the next save, and leaves nothing set aside.
    assert resume(copied, max_steps=6).accountant.steps_spent == 6


def test_what_was_set_aside_goes_once_the_new_save_is_complete(copied):
    resume(copied, str(copied / "checkpoint-2"))
    assert sorted(path.name for path in copied.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_sharded_weights_in_folders_are_listed_and_checked(tmp_path):
    """As FSDP writes them, with a hidden file among them."""
    folder = tmp_path / "checkpoint-3"
    shards = folder / "pytorch_model_fsdp_0"
    shards.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (shards / name).write_bytes(name.encode() * 100)
    for name in ("privacy_record.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    checkpoints.finish(folder)
    checkpoints.check(folder)
    assert {f"pytorch_model_fsdp_0/{n}" for n in (".metadata", "__0_0.distcp", "__1_0.distcp")} <= set(
        manifest(folder)["files"]
    )
    cut(shards / "__1_0.distcp")
    with pytest.raises(ConfigurationError, match="__1_0"):
        checkpoints.check(folder)


def _save_in_two(rank: int, folder: Path, store: str) -> None:
    """One process of two: writes its shard late, the main one must wait for it."""
    import time
    import types

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    args = types.SimpleNamespace(should_save=rank == 0, save_total_limit=1)
    state = types.SimpleNamespace(global_step=3, best_model_checkpoint=None)
    accountant = types.SimpleNamespace(state_dict=lambda: {"steps_spent": 3})
    with checkpoints.saving(folder, args, state, accountant, wait=distributed.barrier):
        assert (folder / "privacy_record.json").is_file()
        assert not checkpoints._is_listed(folder)
        (folder / "shards").mkdir(exist_ok=True)
        if rank == 0:
            (folder / "trainer_state.json").write_text("{}")
        else:
            time.sleep(1)
        (folder / "shards" / f"__{rank}_0.distcp").write_bytes(b"weights")
    assert checkpoints._is_listed(folder)
    distributed.destroy_process_group()


def test_the_main_process_waits_for_the_shards_of_the_others(tmp_path):
    folder = tmp_path / "checkpoint-3"
    torch.multiprocessing.start_processes(
        _save_in_two, args=(folder, str(tmp_path / "store")), nprocs=2, start_method="fork"
    )
    assert {"shards/__0_0.distcp", "shards/__1_0.distcp"} <= set(manifest(folder)["files"])
    checkpoints.check(folder)


# Disk full.


@contextlib.contextmanager
def no_file_above(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def expect_a_clear_refusal(run: DPTrainer, folder: Path, context=contextlib.nullcontext) -> None:
    """The third step's save fails; the second's stays."""
    with context(), pytest.raises(RunFaultError) as failed:
        run.train(resume_from_checkpoint=True)
    said = str(failed.value)
    assert "checkpoint-4: step 4 could not be saved" in said
    assert "checkpoint-2 is complete" in said
    assert "free space" in said
    checkpoints.check(folder / "checkpoint-2")
    with pytest.raises(ConfigurationError, match=r"cut short|empty"):
        checkpoints.check(folder / "checkpoint-4")
    assert resume(folder).accountant.steps_spent == 4


@pytest.mark.parametrize("what", ["record", "weights", "optimizer", "state", "manifest"])
def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(copied, monkeypatch, what):
    shutil.rmtree(copied / "checkpoint-4")
    run = build_trainer(copied, max_steps=4, save_total_limit=1)
    owner, name = {
        "record": (records, "save"),
        "weights": (run.model, "save_pretrained"),
        "optimizer": (torch, "save"),
        "state": (transformers.TrainerState, "save_to_json"),
        "manifest": (checkpoints, "finish"),
    }[what]

    @contextlib.contextmanager
    def disk():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            yield

    expect_a_clear_refusal(run, copied, disk)


def test_a_file_that_the_system_refuses_to_write(copied):
    shutil.rmtree(copied / "checkpoint-4")
    run = build_trainer(copied, max_steps=4, save_total_limit=1)
    expect_a_clear_refusal(run, copied, lambda: no_file_above(10_000))


@pytest.mark.parametrize("what", ["model.safetensors", "optimizer.pt"])
def test_a_real_disk_that_is_full(trained, tmp_path, what):
    """Half of the file finds room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    former = trained / "checkpoint-2"
    sizes = {path.name: -(-path.stat().st_size // 4096) * 4096 for path in former.iterdir()}
    # Beside the file itself: what is written before it, all but the two large ones.
    small = sum(sizes.values()) - sizes["model.safetensors"] - sizes["optimizer.pt"]
    room = sizes[what] // 2 + (what == "optimizer.pt") * (sizes["model.safetensors"] + small // 2)
    size = sum(sizes.values()) + 4096 * 4 + room
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        shutil.copytree(trained / "checkpoint-2", disk / "checkpoint-2")
        run = build_trainer(disk, max_steps=4, save_total_limit=1)
        with pytest.raises(RunFaultError, match="checkpoint-2 is complete"):
            run.train(resume_from_checkpoint=True)
        checkpoints.check(disk / "checkpoint-2")
        subprocess.run(["mount", "-o", "remount,size=10m", "none", disk], check=True)
        assert resume(disk).accountant.steps_spent == 4
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_other_errors_of_a_save_keep_their_type(tmp_path, monkeypatch):
    run = build_trainer(tmp_path, max_steps=2)
    monkeypatch.setattr(
        run, "save_model", lambda *a, **k: (_ for _ in ()).throw(KeyError("of the user's own"))
    )
    with pytest.raises(KeyError):
        run.train()
    assert run.args.save_total_limit == 2


# Data workers.


class Dying(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows, self.alive = rows(), True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if torch.utils.data.get_worker_info() and not self.alive:
            os._exit(3)
        return self.rows[index]


def test_a_dead_worker_is_explained_and_the_count_is_that_of_the_weights(copied):
    shutil.rmtree(copied / "checkpoint-4")
    data = Dying()
    data.alive = False
    run = build_trainer(copied, data=data, max_steps=4, dataloader_num_workers=1)
    with pytest.raises(
        RunFaultError, match=r"DataLoader worker died .* step 3 .*2 steps are spent"
    ) as failed:
        run.train(resume_from_checkpoint=True)
    assert isinstance(failed.value, RuntimeError)
    assert run.accountant.steps_spent == run.state.global_step == 2
    assert resume(copied).accountant.steps_spent == 4


def test_an_error_of_the_dataset_itself_keeps_its_type(tmp_path):
    class Wrong(Dying):
        def __getitem__(self, index: int) -> dict:
            if torch.utils.data.get_worker_info():
                raise LookupError("no such row")
            return super().__getitem__(index)

    run = build_trainer(tmp_path, data=Wrong(), dataloader_num_workers=1)
    with pytest.raises(LookupError, match="no such row"):
        run.train()
    assert run.accountant.steps_spent == 0


def test_models_outside_transformers_are_safetensors_too(tmp_path):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build_model()
            self.config = self.inner.config

        def forward(self, input_ids, labels=None):
            return {"logits": self.inner(input_ids=input_ids).logits}

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")

    run = build_trainer(tmp_path, model=Other(), max_steps=2, compute_loss_func=loss)
    run.train()
    assert safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
