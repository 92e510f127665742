"""A run that can be killed at a chosen place, and writes down what it really did.

Its journal is independent of the package's own count: after every
``optimizer.step`` it notes a digest of the weights and how many releases went
into them. Whoever finds weights in a checkpoint can look up what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from dp_trainer import DPTrainer, PrivacyArguments, checkpoints, records
from dp_trainer.privacy.accountant import PrivacyAccountant, _checksum

STEPS, SAVE_STEPS = 12, 2
VOCABULARY = 40
# Where a run may be stopped for its parent to kill it. Those of a save in the order in which it passes them.
IN_A_STEP = ("forward", "noise drawn", "release made", "optimizer half done", "optimizer done")
IN_A_SAVE = ("save begun", "record written", "weights half written", "weights written", "optimizer written",
             "state written", "manifest written", "old checkpoint half deleted", "save ended")  # fmt: skip
PLACES = (*IN_A_STEP, *IN_A_SAVE)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(3, VOCABULARY, (64, 8), generator=generator)
    return [{"input_ids": ids.tolist(), "labels": index % 2} for index, ids in enumerate(draw)]


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([sample[key] for sample in samples]) for key in ("input_ids", "labels")}


def build_model() -> transformers.BertForSequenceClassification:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def build_trainer(
    folder: Path,
    model: Any = None,
    data: Any = None,
    thorough: bool = False,
    callback: Any = None,
    compute_loss_func: Any = None,
    **changes: Any,
) -> DPTrainer:
    """A run that leaves out what takes seconds and is not tested here, unless it is thorough."""
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        **changes,
    }
    run = DPTrainer(
        model=model or build_model(),
        args=TrainingArguments(str(folder), **settings),
        callbacks=[callback] if callback else None,
        compute_loss_func=compute_loss_func,
        eval_dataset=rows()[:4],
        train_dataset=rows() if data is None else data,
        data_collator=collate,
        privacy=PrivacyArguments(
            noise_multiplier=1.0, target_delta=1e-3, certificate_samples=2 if thorough else 0
        ),
    )
    if not thorough:
        run.privacy_statement = _Statement
    return run


class _Statement:
    def to_json(self) -> str:
        return "{}"

    to_prose = model_card_section = to_json

    def published(self) -> _Statement:
        return self


def digest(weights: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()


class Journal:
    """Lines of JSON that survive a kill: each is written in one call, and nothing is buffered."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, **entry: Any) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps(entry) + "\n").encode())
        os.close(descriptor)

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def releases_in(self, weights: dict[str, torch.Tensor]) -> int | None:
        """What went into these weights; None if no run ever had them."""
        key = digest(weights)
        return next((e["releases"] for e in reversed(self.entries()) if e.get("weights") == key), None)


class Hooks:
    """Stops the run at one place of one step, and keeps the journal."""

    def __init__(self, run: DPTrainer, journal: Journal, place: str | None, steps: int) -> None:
        self.run, self.journal, self.place, self.steps = run, journal, place, steps
        self.releases = self.first = 0

    def at(self, place: str) -> None:
        step = self.run.state.global_step + (place in IN_A_STEP)
        if place == self.place and step >= self.first + self.steps:
            self.journal.note(at=place, step=step, spent=self.run.accountant.steps_spent)
            time.sleep(600)

    def after(self, owner: Any, name: str, place: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.at(place)
            return result

        setattr(owner, name, wrapped)

    def install(self) -> None:
        run = self.run
        run.model.bert.register_forward_hook(
            lambda *_: self.at("forward") if run.accountant.steps_spent > run.state.global_step else None
        )
        self.after(run._noise, "add_noise_", "noise drawn")
        self.after(run, "training_step", "release made")
        self.after(checkpoints, "_begin", "save begun")
        self.after(records, "save", "record written")
        self.after(run, "save_model", "weights written")
        self.after(run, "_save_optimizer_and_scheduler", "optimizer written")
        self.after(run, "_save_rng_state", "state written")
        self.after(checkpoints, "finish", "manifest written")
        self.after(run, "_save_checkpoint", "save ended")
        self._split_weights()
        self._split_deletion()

    def _split_weights(self) -> None:
        original = self.run._save

        def half(output_dir: str | None = None, state_dict: Any = None) -> None:
            original(output_dir, state_dict)
            path = Path(str(output_dir)) / "model.safetensors"
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            self.at("weights half written")
            path.write_bytes(content)

        self.run._save = half

    def _split_deletion(self) -> None:
        original = checkpoints.shutil.rmtree

        def half(folder: Any, *args: Any, **kwargs: Any) -> None:
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            for path in files[: len(files) // 2]:
                path.unlink()
            self.at("old checkpoint half deleted")
            original(folder, *args, **kwargs)

        checkpoints.shutil = type("shutil", (), {"rmtree": staticmethod(half)})

    def split_step(self, optimizer: torch.optim.Optimizer) -> None:
        original = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            groups = [group["params"] for group in optimizer.param_groups]
            kept = [p.grad for params in groups for p in params]
            before = [p.detach().clone() for params in groups for p in params]
            # Half of the parameters move first, as in an optimizer that is interrupted.
            with torch.no_grad():
                for p in groups[0][: len(groups[0]) // 2]:
                    p.sub_(1e-3 * p.grad)
            self.at("optimizer half done")
            with torch.no_grad():
                for p, old, grad in zip((p for ps in groups for p in ps), before, kept, strict=True):
                    p.copy_(old)
                    p.grad = grad
            result = original(*args, **kwargs)
            self.releases += 1
            self.note_weights()
            self.at("optimizer done")
            return result

        optimizer.step = step

    def note_weights(self) -> None:
        self.journal.note(weights=digest(dict(self.run.model.state_dict())), releases=self.releases)


class Watch(TrainerCallback):
    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hooks = self.hooks
        weights = dict(hooks.run.model.state_dict())
        hooks.first = state.global_step
        hooks.releases = hooks.journal.releases_in(weights) or 0
        hooks.note_weights()
        hooks.journal.note(started=state.global_step, spent=hooks.run.accountant.steps_spent,
                           released=hooks.releases)  # fmt: skip
        hooks.split_step(getattr(hooks.run.optimizer, "optimizer", hooks.run.optimizer))


# Planted faults: what the harness must notice.


def plant_record_short() -> None:
    """One step fewer, in the record and in the state that it is held against."""
    original = PrivacyAccountant.state_dict
    to_json = transformers.TrainerState.save_to_json

    def short(self: PrivacyAccountant) -> dict[str, Any]:
        record = {k: v for k, v in original(self).items() if k != "checksum"}
        record["steps_spent"] -= 1
        return {**record, "checksum": _checksum(record)}

    def behind(self: Any, path: str) -> None:
        self.global_step -= 1
        to_json(self, path)
        self.global_step += 1

    PrivacyAccountant.state_dict = short
    transformers.TrainerState.save_to_json = behind


def plant_manifest_first() -> None:
    """The list of files is written before the weights are."""
    save = records.save

    def early(folder: Path, accountant: PrivacyAccountant) -> None:
        save(folder, accountant)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": accountant.steps_spent}))
        checkpoints.finish(folder)

    records.save = early


PLANTS: dict[str, Callable[[], None]] = {
    "record one step short": plant_record_short,
    "manifest written first": plant_manifest_first,
}


def go(folder: Path, journal_path: Path, place: str | None, steps: int, plant: str | None) -> None:
    """One run, from the newest complete checkpoint if there is one; ends in a kill or at the last step."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if plant:
        PLANTS[plant]()
    journal = Journal(journal_path)
    try:
        run = build_trainer(folder)
        hooks = Hooks(run, journal, place, steps)
        hooks.install()
        run.add_callback(Watch(hooks))
        newest = checkpoints.newest_complete(folder)
        run.train(resume_from_checkpoint=None if newest is None else True)
        journal.note(ended=run.state.global_step, spent=run.accountant.steps_spent)
    except Exception as error:
        journal.note(error=f"{type(error).__name__}: {error}")
        raise


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, after everything else in it has been read too."""
    torch.load(folder / "optimizer.pt", weights_only=True)
    torch.load(folder / "scheduler.pt", weights_only=True)
    transformers.TrainerState.load_from_json(str(folder / "trainer_state.json"))
    transformers.BertForSequenceClassification.from_pretrained(folder)
    return load_file(folder / "model.safetensors")


def complete_and_not(folder: Path) -> tuple[list[Path], list[Path]]:
    complete, cut_short = [], []
    for path in sorted(folder.glob("checkpoint-*")):
        try:
            checkpoints.check(path)
            complete.append(path)
        except ValueError:
            cut_short.append(path)
    return complete, cut_short
