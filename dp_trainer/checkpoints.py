"""Checkpoints that are whole, or say that they are not.

A manifest in the folder lists its files. It is there from the first moment of a
save, without a list, and gets its list as the last of all files, once the others
are on disk. So a folder is one of these, whenever the process was killed:

- no manifest: made by another program or an earlier version, or nothing was written yet;
- a manifest without a list: the save was cut short;
- a manifest with a list: complete, if every file is as listed.

Older checkpoints are deleted only after that, never the one just completed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from dp_trainer import records
from dp_trainer.errors import ConfigurationError, RunFaultError
from dp_trainer.privacy.accountant import PrivacyAccountant

logger = logging.get_logger(__name__)

MANIFEST_NAME = "checkpoint_manifest.json"
MANIFEST_VERSION = 1
_NEEDED = (records.RECORD_NAME, records.TRAINER_STATE_NAME)
# The ending of a complete checkpoint that waits until the same step's next save is complete too.
_FORMER = ".former"
_FOLDER = re.compile(rf"checkpoint-(\d+)({re.escape(_FORMER)})?")
# At most so much of a file is read for its checksum, so that large models are not read twice a save.
_PIECE, _PIECES = 2**20, 64
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)


@contextlib.contextmanager
def saving(
    folder: Path,
    args: TrainingArguments,
    state: TrainerState,
    accountant: PrivacyAccountant,
    *,
    wait: Callable[[], None],
) -> Iterator[None]:
    """Makes what is written inside a checkpoint that is complete or known not to be.

    Guarantee: the folder is complete only once every file of every process is on
    disk, the accountant's record first among them. No older checkpoint is deleted
    before that, and the newest complete one never.

    Args:
        folder: The checkpoint. What a save that was cut short left there is removed; a complete one is
            set aside as ``checkpoint-N.former`` and removed once this one is complete.
        args: ``should_save`` says which process keeps the manifest; ``save_total_limit`` is obeyed here,
            and hidden from what runs inside, which would delete too early.
        state: Names the best checkpoint, which is kept too.
        accountant: Its record goes into the folder.
        wait: Returns once all processes have called it.

    Raises:
        RunFaultError: If the disk refuses a file; older checkpoints are untouched.
    """
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        if args.should_save:
            _begin(folder)
            records.save(folder, accountant)
        wait()
        yield
        wait()
        if args.should_save:
            finish(folder)
            _remove(_former(folder))
            _rotate(folder, limit=limit, best=state.best_model_checkpoint)
        # A process that exits now would take the main one along, in some launchers.
        wait()
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        last = newest_complete(folder.parent)
        kept = (
            f"{last} is complete: free space and resume from it"
            if last
            else "No other checkpoint is complete"
        )
        raise RunFaultError(
            f"{folder}: step {state.global_step} could not be saved ({error}). The folder is marked incomplete. "
            f"{kept}. A lower save_total_limit needs less space."
        ) from error
    finally:
        args.save_total_limit = limit


def finish(folder: Path) -> None:
    """Lists what the folder holds as a complete checkpoint; every file is on disk before the list is.

    Raises:
        ConfigurationError: If the privacy record or the Trainer's state is not among the files.
    """
    files = {}
    for path in _files(folder):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = _describe(path)
    for name in _NEEDED:
        if name not in files:
            raise ConfigurationError(f"{folder / name}: missing, so this is no checkpoint to resume from.")
    for inside in [path for path in folder.rglob("*") if path.is_dir()]:
        _flush(inside)
    _write_manifest(folder, files)


def check(folder: Path) -> None:
    """Returns if the checkpoint is complete and every file is as it was written.

    Raises:
        ConfigurationError: Naming the file, what is wrong with it, and what to do.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: no such checkpoint folder.")
    if not any(folder.iterdir()):
        raise ConfigurationError(f"{folder}: an empty folder, no checkpoint. {_WAY_OUT}")
    manifest = records.read_json(folder / MANIFEST_NAME)
    if manifest is None:
        raise ConfigurationError(
            f"{folder / MANIFEST_NAME}: missing. Versions before this one wrote none, so nobody can tell whether the "
            "save ended. If you know that it did, call dp_trainer.checkpoints.finish(Path(...)) on the folder once "
            f"and resume from it. Else: {_WAY_OUT}"
        )
    if manifest.get("version") != MANIFEST_VERSION:
        raise ConfigurationError(
            f"{folder / MANIFEST_NAME}: has version {manifest.get('version')!r}, this package reads "
            f"{MANIFEST_VERSION}. Resume with the version that wrote it."
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ConfigurationError(f"{folder}: incomplete, its save was cut short. {_WAY_OUT}")
    for name in sorted({*files, *_NEEDED}):
        _check_file(folder / name, files.get(name))


def to_resume(wanted: str | bool | None, output_dir: str) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means, checked; None if it asks for none.

    Raises:
        ConfigurationError: If it is incomplete or damaged; for True, if no checkpoint is complete.
    """
    if not wanted:
        return None
    if wanted is not True:
        check(Path(wanted))
        return Path(wanted)
    found = newest_complete(Path(output_dir))
    if found is None:
        raise ConfigurationError(
            f"{output_dir} has no complete checkpoint to resume from. Start without resume_from_checkpoint: the new "
            "run's weights have spent nothing yet."
        )
    return found


def newest_complete(output_dir: Path) -> Path | None:
    """The complete checkpoint of most steps, or None; a warning names those of more steps that are not."""
    for folder in sorted(_checkpoints(output_dir), key=lambda f: (_step(f), not _is_former(f)), reverse=True):
        try:
            check(folder)
        except ConfigurationError as error:
            logger.warning(f"Skipped a checkpoint: {error}")
        else:
            return folder
    return None


_WAY_OUT = "Resume from another checkpoint, or with resume_from_checkpoint=True from the newest complete one."


def _begin(folder: Path) -> None:
    """Leaves the folder with a manifest that says "cut short", and nothing else."""
    if _is_listed(folder):
        # It may be the only complete one.
        _remove(_former(folder))
        folder.rename(_former(folder))
    _remove(folder)
    folder.mkdir(parents=True)
    _write_manifest(folder, None)


def _write_manifest(folder: Path, files: dict[str, Any] | None) -> None:
    content = {"version": MANIFEST_VERSION, "step": _step(folder), "files": files}
    records.write(folder / MANIFEST_NAME, json.dumps(content, indent=1))
    _flush(folder)
    _flush(folder.parent)


def _rotate(newest: Path, *, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints beyond the limit: those cut short first; never the newest or the best.

    Which is newest cannot be left to step numbers: a run resumed further back leaves higher ones behind.
    """
    if not limit or limit < 0:
        return
    kept = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    others = [folder for folder in _checkpoints(newest.parent) if folder.resolve() not in kept]
    others.sort(key=lambda folder: (_is_listed(folder), folder.stat().st_mtime, _step(folder)))
    for folder in others[: max(0, len(others) + len(kept) - limit)]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; a kill on the way leaves nothing that looks complete."""
    if folder.is_dir():
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _former(folder: Path) -> Path:
    return folder.with_name(folder.name + _FORMER)


def _is_former(folder: Path) -> bool:
    return folder.name.endswith(_FORMER)


def _checkpoints(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    return [path for path in output_dir.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]


def _step(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _is_listed(folder: Path) -> bool:
    try:
        manifest = records.read_json(folder / MANIFEST_NAME)
    except ConfigurationError:
        return False
    return isinstance((manifest or {}).get("files"), dict)


def _files(folder: Path) -> list[Path]:
    """Every file, those of sharded weights inside folders and hidden ones too."""
    partial = set(folder.rglob(".*.partial"))
    return sorted(
        p for p in folder.rglob("*") if p.is_file() and p not in partial and p != folder / MANIFEST_NAME
    )


def _describe(path: Path) -> dict[str, Any]:
    """Size and checksum. A large file's is over pieces at even distances, the first and the last among them."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= _PIECE * _PIECES:
            digest = hashlib.file_digest(file, "sha256")
        else:
            for index in range(_PIECES):
                file.seek((size - _PIECE) * index // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return {"bytes": size, "sha256": digest.hexdigest(), "whole": size <= _PIECE * _PIECES}


def _check_file(path: Path, listed: dict[str, Any] | None) -> None:
    if listed is None:
        raise ConfigurationError(f"{path}: not among the files of the manifest. {_WAY_OUT}")
    if not path.is_file():
        raise ConfigurationError(f"{path}: missing from the checkpoint. {_WAY_OUT}")
    size = path.stat().st_size
    if size != listed["bytes"]:
        raise ConfigurationError(
            f"{path}: damaged, it has {size:,} bytes and was written with {listed['bytes']:,}. {_WAY_OUT}"
        )
    if _describe(path) != listed:
        raise ConfigurationError(f"{path}: damaged, its checksum is not that of what was written. {_WAY_OUT}")


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_of_the_disk(error: Exception) -> bool:
    """Whether writing failed; torch and safetensors raise errors of their own for it."""
    if isinstance(error, OSError):
        # Errors of the network, from uploads, are OSErrors too.
        return error.errno in _DISK
    return any(name in str(error) for name in ("os error", "PytorchStreamWriter", "inline_container"))
