"""What ``TrainingArguments`` and a dataset mean for the privacy plan: batch, steps, what lies outside."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

from transformers import TrainerState, TrainingArguments

from dp_trainer.arguments import PrivacyArguments
from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.plan import PrivacyPlan, make_plan
from dp_trainer.privacy.sampling import steps_per_epoch
from dp_trainer.privacy.search import SearchCost
from dp_trainer.privacy.users import rows_by_user


def plan_of_run(
    args: TrainingArguments,
    privacy: PrivacyArguments,
    train_dataset: Any,
    *,
    accumulation: int,
    steps_wanted: int,
) -> PrivacyPlan:
    """Works out the numbers of a run from the arguments as the user wrote them.

    Args:
        args: Training arguments, accumulation and steps aside, which the mechanism fixes.
        privacy: The privacy settings.
        train_dataset: The training set.
        accumulation: ``gradient_accumulation_steps`` as the user wrote it.
        steps_wanted: ``max_steps`` as the user wrote it; not positive for whole epochs.

    Raises:
        ConfigurationError: If the dataset has no length, or the numbers contradict each other.
        PrivacyBudgetError: If the target cannot be reached.
    """
    if not isinstance(train_dataset, Sized):
        raise ConfigurationError(
            "train_dataset has no length, and the sampling probability needs one. Use a map-style dataset, "
            "for instance datasets.Dataset.from_generator(...)."
        )
    present, batch = len(train_dataset), args.train_batch_size * accumulation * args.world_size
    if privacy.user_column is not None:
        present = len(rows_by_user(train_dataset, privacy.user_column))
        batch = max(1, batch // (privacy.samples_per_user or 1))
    batch = privacy.expected_batch_size or batch
    # A stated public size also decides the number of steps, which would else show the true one.
    size = privacy.dataset_size or present
    steps = steps_wanted
    if steps <= 0:
        drawn = size if privacy.sampling == "full_batch" else batch
        steps = math.ceil(args.num_train_epochs * steps_per_epoch(size, drawn))
    return make_plan(privacy, dataset_size=present, expected_batch_size=batch, steps=steps)


def computed_outside(args: TrainingArguments, state: TrainerState, search: SearchCost | None) -> list[str]:
    """Returns what else this run computed on data, outside the guarantee, in words."""
    outside = []
    if any(key.startswith("eval_") for entry in state.log_history for key in entry):
        outside.append("evaluation during training, on the evaluation data")
    if args.load_best_model_at_end:
        outside.append("the choice of the best checkpoint by evaluation results")
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) == "reduce_lr_on_plateau":
        outside.append("the learning rate, which followed evaluation results")
    if search is not None:
        outside.append(str(search))
    return outside
