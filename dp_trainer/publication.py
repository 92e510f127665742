"""What leaves the house: model cards and pushed folders carry what the guarantee covers, and no more.

The guarantee is about weights. Losses, evaluation results and dropped-sample counts come from the
data without noise, and ``transformers.Trainer`` publishes them: in the model card, in the
state of pushed checkpoints, and by uploading whatever lies in ``output_dir``, plots and event files among it.
Here, unless ``release_training_metrics`` says otherwise:

- model cards hold settings and the privacy section, no results;
- a push uploads a folder made for it, with what ``save_model`` writes, and nothing that happens to lie beside;
- a pushed checkpoint is complete and can be resumed, but its state knows only counts and settings.

Checkpoints on the own disk keep the history of the log: resuming continues it, and whoever can read that
disk can read the data too. Copying such a folder elsewhere by hand publishes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from dp_trainer import checkpoints, records
from dp_trainer.arguments import PrivacyArguments
from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.statement import PrivacyStatement

CARD_NAME = "README.md"
_BEGIN, _END = "<!-- dp_trainer: privacy -->", "<!-- dp_trainer: end of privacy -->"
_NEW_CARD = "---\ntags:\n- differential-privacy\n---\n"
# A state's counts and settings; the rest is measured on data, or chosen by what was.
_PUBLIC_STATE = (
    *("epoch", "global_step", "max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps"),
    *("train_batch_size", "is_local_process_zero", "is_world_process_zero"),
)
# The Trainer never uploads what begins with an underscore, should a push look here meanwhile.
_STAGING = "_publication-"


class PublishingTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` whose model cards and pushes stay within the guarantee.

    Guarantee: see the module's text. A class, because these are methods that ``Trainer`` calls itself.
    """

    args: TrainingArguments
    privacy: PrivacyArguments

    def published_statement(self) -> PrivacyStatement | None:
        """The statement for publication, without measurements; None before the first release."""
        raise NotImplementedError

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,  # noqa: A002 - Trainer's name for it
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the model card as ``Trainer``, with the privacy section and without results."""
        with _without_history(self.state, kept=self.privacy.release_training_metrics):
            super().create_model_card(
                language=language,
                license=license,
                tags=tags,
                model_name=model_name,
                finetuned_from=finetuned_from,
                tasks=tasks,
                dataset_tags=dataset_tags,
                dataset=dataset,
                dataset_args=dataset_args,
            )
        if self.is_world_process_zero():
            put_section(Path(self.args.output_dir) / CARD_NAME, self.published_statement())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and beside it the privacy statement of its weights and a section of its card."""
        super().save_model(output_dir, _internal_call)
        statement = self.published_statement()
        if self.args.should_save and statement is not None:
            folder = Path(output_dir or self.args.output_dir)
            # A sharded model whose shards are saved with checkpoints alone has written nothing yet.
            folder.mkdir(parents=True, exist_ok=True)
            put_section(folder / CARD_NAME, statement)
            records.save_statement(folder, statement)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        language: str | None = None,
        license: str | None = None,  # noqa: A002 - Trainer's name for it
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> Any:
        """Uploads model, tokenizer, privacy statement and model card; see the module's text for what stays."""
        card = {
            "language": language,
            "license": license,
            "tags": tags,
            "finetuned_from": finetuned_from,
            "tasks": tasks,
            "dataset_tags": dataset_tags,
            "dataset": dataset,
            "dataset_args": dataset_args,
            "model_name": model_name or Path(self.args.hub_model_id or self.args.output_dir).name,
        }
        # Before the folder changes its name, which would become the repository's.
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        with self._staged() as staging:
            done = super().push_to_hub(commit_message, blocking, token, revision, private, **card)
            _remove_after(staging, done)
        return done

    def push_checkpoint(self, folder: Path) -> None:
        """Uploads a complete checkpoint as ``hub_strategy`` asks, in its public form."""
        if not (self.args.push_to_hub and self.is_world_process_zero()):
            return
        with self._staged() as staging:
            public = _public_checkpoint(folder, staging, whole=self.privacy.release_training_metrics)
            for name in (CARD_NAME, *(f"{records.STATEMENT_NAME}.{kind}" for kind in ("json", "md"))):
                if (public / name).is_file():
                    shutil.copyfile(public / name, staging / name)
            super()._push_from_checkpoint(str(public))
            jobs = [] if self.push_in_progress is None else self.push_in_progress.jobs
            _remove_after(staging, jobs[-1] if jobs else None)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: in the middle of a save the checkpoint is not complete; ``push_checkpoint`` follows."""

    @contextlib.contextmanager
    def _staged(self) -> Iterator[Path]:
        """Makes ``output_dir`` an empty folder beside the run's files, on the process that publishes."""
        own = self.args.output_dir
        if not self.is_world_process_zero() or self.privacy.release_training_metrics:
            yield Path(own)
            return
        Path(own).mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=own))
        self.args.output_dir = str(staging)
        try:
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            self.args.output_dir = own


def refuse_unpublishable(args: TrainingArguments, privacy: PrivacyArguments) -> None:
    """Raises for a push that would have to carry evaluation results.

    Raises:
        ConfigurationError: For pushed checkpoints whose learning-rate schedule remembers them.
    """
    follows = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) == "reduce_lr_on_plateau"
    whole = args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
    if args.push_to_hub and follows and whole and not privacy.release_training_metrics:
        raise ConfigurationError(
            "TrainingArguments.lr_scheduler_type: reduce_lr_on_plateau keeps the best evaluation result in its state, "
            f"which hub_strategy='{args.hub_strategy.value}' would publish. Push with hub_strategy='every_save', or "
            "set release_training_metrics to true."
        )


def put_section(card: Path, statement: PrivacyStatement | None) -> None:
    """Puts the privacy section into a model card, in place of an earlier one; makes the card if there is none."""
    if statement is None:
        return
    text = card.read_text(encoding="utf-8") if card.is_file() else _NEW_CARD
    before, found, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2].strip() if found else ""
    section = f"{_BEGIN}\n{statement.model_card_section()}\n{_END}"
    records.write(card, "\n\n".join(part for part in (before.rstrip(), section, after) if part))


def _public_checkpoint(folder: Path, staging: Path, *, whole: bool) -> Path:
    """Returns the checkpoint in its public form; files are linked, not copied, where the disk allows it."""
    if whole:
        return folder
    public = staging / folder.name
    shutil.copytree(folder, public, copy_function=_link)
    state = json.loads((folder / records.TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(TrainerState)}
    counts = TrainerState(**{name: state[name] for name in _PUBLIC_STATE if name in state.keys() & known})
    # ``write`` replaces a file, and so leaves the linked original as it is.
    records.write(
        public / records.TRAINER_STATE_NAME, json.dumps(dataclasses.asdict(counts), indent=2, sort_keys=True)
    )
    (public / checkpoints.MANIFEST_NAME).unlink()
    checkpoints.finish(public)
    return public


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


@contextlib.contextmanager
def _without_history(state: TrainerState, *, kept: bool) -> Iterator[None]:
    history = state.log_history
    state.log_history = history if kept else []
    try:
        yield
    finally:
        state.log_history = history


def _remove_after(staging: Path, upload: Any) -> None:
    """Deletes a staging folder once its upload has ended; uploads run one after another."""
    if not staging.name.startswith(_STAGING):
        return
    if hasattr(upload, "add_done_callback"):
        upload.add_done_callback(lambda _: shutil.rmtree(staging, ignore_errors=True))
    else:
        shutil.rmtree(staging, ignore_errors=True)
