"""Tasks by name. A new task is one file, one row of ``TASKS`` and one YAML file."""

from __future__ import annotations

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.base import Task
from dp_trainer.tasks.e2e import E2E
from dp_trainer.tasks.names import nearest, quoted
from dp_trainer.tasks.sentiment import SENTIMENT
from dp_trainer.tasks.sst2 import SST2

TASKS: dict[str, Task] = {task.name: task for task in (SENTIMENT, SST2, E2E)}


def find_task(name: str) -> Task:
    """Returns the task of that name; ConfigurationError names the nearest one otherwise."""
    if name not in TASKS:
        raise ConfigurationError(
            f"task={name}: unknown; the tasks are {quoted(sorted(TASKS))}. "
            f"Did you mean {quoted(nearest(name, TASKS))}?"
        )
    return TASKS[name]


__all__ = ["TASKS", "Task", "find_task"]
