"""What a run leaves on disk about its privacy: the accountant's record and the statement.

A record holds counts and settings, never a key or a generator's state: whoever
reads a checkpoint learns nothing about past or future noise.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.accountant import PrivacyAccountant
from dp_trainer.privacy.statement import PrivacyStatement

RECORD_NAME = "privacy_record.json"
STATEMENT_NAME = "privacy_statement"
TRAINER_STATE_NAME = "trainer_state.json"


def save(folder: Path, accountant: PrivacyAccountant) -> None:
    """Writes the accountant's record into a checkpoint folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / RECORD_NAME, json.dumps(accountant.state_dict(), indent=2))


def load(folder: Path, accountant: PrivacyAccountant) -> None:
    """Continues the count of a checkpoint.

    Guarantee: on return the accountant has counted at least the steps that the
    checkpoint's weights have seen; on any error its count is unchanged.

    Raises:
        ConfigurationError: If the record is missing, damaged, of another plan, or behind the weights.
        PrivacyBudgetError: If the checkpoint has spent more than this plan allows.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: no such checkpoint folder.")
    record = read_json(folder / RECORD_NAME)
    weights_seen = (read_json(folder / TRAINER_STATE_NAME) or {}).get("global_step")
    counted = (record or {}).get("steps_spent")
    if record is not None and weights_seen != counted:
        raise ConfigurationError(
            f"{folder}: the weights are from step {weights_seen}, the privacy record counts {counted}. "
            "The checkpoint's files do not belong together: use another checkpoint."
        )
    accountant.load_state(record)


def save_statement(folder: Path, statement: PrivacyStatement) -> None:
    """Writes the statement as JSON and as a page of Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{STATEMENT_NAME}.json", statement.to_json())
    write(folder / f"{STATEMENT_NAME}.md", statement.to_prose())


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's JSON object; None where there is no file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path}: damaged ({error}). Resume from another checkpoint, or start again with a fresh budget."
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: damaged, it holds no record. Resume from another checkpoint.")
    return content


def write(path: Path, text: str) -> None:
    """Replaces the file in one step, so that a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
