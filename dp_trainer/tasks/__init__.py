"""Tasks by name. A new task is one file, one row of ``TASKS`` and one YAML file."""

from __future__ import annotations

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.arguments import HEADS
from dp_trainer.tasks.base import Task
from dp_trainer.tasks.e2e import E2E
from dp_trainer.tasks.images import CIFAR10, IMAGE_FOLDER
from dp_trainer.tasks.mnli import MNLI
from dp_trainer.tasks.names import nearest, quoted
from dp_trainer.tasks.qnli import QNLI
from dp_trainer.tasks.qqp import QQP
from dp_trainer.tasks.sentiment import SENTIMENT
from dp_trainer.tasks.sst2 import SST2

TASKS: dict[str, Task] = {
    task.name: task for task in (SENTIMENT, SST2, MNLI, QNLI, QQP, E2E, IMAGE_FOLDER, CIFAR10)
}


def find_task(name: str, *, head: str = HEADS[0]) -> Task:
    """Returns the task of that name, for a model with that head.

    Args:
        name: A key of ``TASKS``.
        head: ``classification`` for the task's ordinary head (a language model's, where it writes text);
            ``label_words`` for a masked language model that puts one word for each class at the mask.

    Raises:
        ConfigurationError: If there is no such task or head, naming the nearest, or the task has no label words.
    """
    if name not in TASKS:
        raise ConfigurationError(
            f"task={name}: unknown; the tasks are {quoted(sorted(TASKS))}. "
            f"Did you mean {quoted(nearest(name, TASKS))}?"
        )
    if head not in HEADS:
        raise ConfigurationError(f"head={head}: unknown. Did you mean {quoted(nearest(head, HEADS))}?")
    if head == "classification":
        return TASKS[name]
    task = TASKS[name].label_words
    if task is None:
        able = sorted(other for other, row in TASKS.items() if row.label_words is not None)
        raise ConfigurationError(
            f"head={head}: task '{name}' has no label words; {quoted(able)} have. Leave head out, or take one of them."
        )
    return task


__all__ = ["TASKS", "Task", "find_task"]
