"""Fine-tunes a model privately: ``python scripts/finetune.py --config configs/X.yaml [--key value …]``.

Writes into ``output_dir``:

    model/                      weights and tokenizer (or image processor): the private result
    privacy_statement.{json,md} what is guaranteed about them
    metrics.json, log_history.json, training.png, generated.json
                                how it went; computed without noise, so not for publication

``--private false`` trains the same way without privacy, for comparison.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import time
from pathlib import Path

from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from dp_trainer import DPTrainer, PrivacyArguments
from dp_trainer.distributed import leave_ranks
from dp_trainer.errors import ConfigurationError, DPTrainerError
from dp_trainer.tasks import find_task
from dp_trainer.tasks.arguments import DataArguments, GenerationArguments, ModelArguments, RunArguments
from dp_trainer.tasks.base import Dataset, PreparedSplit, Processor, Task
from dp_trainer.tasks.config import parse_configuration
from dp_trainer.tasks.generation import Decoding, evaluate_generation, require_metrics
from dp_trainer.tasks.images import with_classes
from dp_trainer.tasks.loading import load_rows, prepare_splits
from dp_trainer.tasks.models import count_parameters, load_model, load_processor
from dp_trainer.tasks.report import (
    PrivacySpent,
    draw_training,
    evaluation_at,
    metrics_record,
    require_plotting,
    summary_lines,
    write_json,
)

# Places and devices of this machine: they change no result, and a file may be passed on.
NOT_SETTINGS = ("output_dir", "logging_dir", "local_rank", "hub_token", "run_name")
SETTINGS = (
    *(ModelArguments, DataArguments, RunArguments, GenerationArguments),
    *(TrainingArguments, PrivacyArguments),
)


def main(argv: list[str]) -> None:
    """Parses, builds, trains, reports."""
    model_arguments, data, run, generation, training, privacy = parse_configuration(argv, SETTINGS)
    task = find_task(data.task, head=model_arguments.head)
    refuse_unfit(task, run, generation, training)
    set_seed(training.seed)  # the new head's first weights; noise and sampling have their own secret keys
    processor = load_processor(task, model_arguments)
    with training.main_process_first(desc="loading the data"):
        rows = load_rows(task, data)
        task = with_classes(task, rows)
        user_column = privacy.user_column if run.private else None
        splits = prepare_splits(task, rows, processor, max_length=data.max_length, user_column=user_column)
    model = load_model(task, model_arguments, processor)

    trainer = build_trainer(task, model, processor, splits, training, privacy if run.private else None)
    if trainer.is_world_process_zero():
        print_before(task, model, splits, trainer.plan if run.private else "ordinary training: no privacy")

    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=wanted_checkpoint(training))
    seconds = time.perf_counter() - start

    evaluations = evaluate(trainer, task, splits)
    trainer.save_model(str(Path(training.output_dir) / "model"))
    if task.writing and generation.generate:
        split = [name for name in task.evaluation_splits if name in rows][-1]
        evaluations[split] |= write_texts(trainer, task, rows[split], processor, generation)
    if training.push_to_hub:
        trainer.push_to_hub()  # the model, its card and its statement, nothing that was measured
    if trainer.is_world_process_zero():
        settings = in_plain_words(model_arguments, data, run, generation, training, privacy)
        report(trainer, task, splits, run, evaluations, seconds, settings)


def wanted_checkpoint(training: TrainingArguments) -> str | bool | None:
    """The checkpoint to go on from; ``true`` arrives as text and means the newest complete one."""
    wanted: str | None = training.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(wanted).lower(), wanted)


def refuse_unfit(
    task: Task, run: RunArguments, generation: GenerationArguments, training: TrainingArguments
) -> None:
    """Refuses, before any work, what this script cannot do."""
    if training.push_to_hub and not run.private:
        raise ConfigurationError(
            "push_to_hub: without privacy it would publish losses and evaluations that no noise protects. "
            "Train without it, then upload the folder model/."
        )
    if run.plots:
        require_plotting()
    if task.writing and generation.generate:
        require_metrics()
        decoding(generation, training)


def build_trainer(
    task: Task,
    model: nn.Module,
    processor: Processor,
    splits: dict[str, PreparedSplit],
    training: TrainingArguments,
    privacy: PrivacyArguments | None,
) -> Trainer:
    """Builds a DPTrainer; without privacy arguments the ordinary Trainer on the same parts."""
    parts = {
        "model": model,
        "args": training,
        "train_dataset": splits[task.train_split].dataset,
        "eval_dataset": splits[task.validation_split].dataset,
        "data_collator": task.collator(processor),
        "processing_class": processor,
        "compute_loss_func": task.loss_function(label_smoothing=training.label_smoothing_factor),
        "compute_metrics": task.compute_metrics,
        "preprocess_logits_for_metrics": task.preprocess_logits,
    }
    return Trainer(**parts) if privacy is None else DPTrainer(**parts, privacy=privacy)


def print_before(task: Task, model: nn.Module, splits: dict[str, PreparedSplit], plan: object) -> None:
    """Says what is about to be trained, and at what privacy."""
    trains, total = count_parameters(model)
    print(f"task {task.name}: {trains:,} of {total:,} parameters train")
    for name, split in splits.items():
        print(f"  {name}: {len(split.dataset):,} samples, {split.dropped:,} dropped as too long")
    print(plan, flush=True)


def evaluate(trainer: Trainer, task: Task, splits: dict[str, PreparedSplit]) -> dict[str, dict[str, float]]:
    """Evaluates the final weights on every split but the train split."""
    evaluations = {}
    for name in (name for name in task.evaluation_splits if name in splits):
        validating = name == task.validation_split
        prefix = "eval" if validating else name
        # The last step may have been evaluated already; a best model loaded since has other weights.
        logged = evaluation_at(trainer.state.log_history, trainer.state.global_step)
        if validating and logged is not None and not trainer.args.load_best_model_at_end:
            evaluations[name] = logged
            continue
        metrics = trainer.evaluate(splits[name].dataset, metric_key_prefix=prefix)
        evaluations[name] = {key.removeprefix(f"{prefix}_"): value for key, value in metrics.items()}
    return evaluations


def decoding(generation: GenerationArguments, training: TrainingArguments) -> Decoding:
    """How texts are chosen; refuses settings that contradict each other."""
    return Decoding(
        num_beams=generation.num_beams,
        min_new_tokens=generation.min_new_tokens,
        max_new_tokens=generation.max_new_tokens,
        length_penalty=generation.length_penalty,
        batch_size=training.per_device_eval_batch_size,
    )


def write_texts(
    trainer: Trainer, task: Task, rows: Dataset, processor: Processor, generation: GenerationArguments
) -> dict[str, float]:
    """Lets the model write for every prompt of a split, keeps the texts, returns their scores."""
    written = evaluate_generation(
        model=trainer.model,
        tokenizer=processor,
        rows=rows,
        writing=task.writing,
        decoding=decoding(generation, trainer.args),
        max_groups=generation.max_generated,
    )
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir) / "generated.json", written.records())
    return {**written.metrics, "prompts": len(written.samples)}


def in_plain_words(*settings: object) -> dict[str, object]:
    """What the run was told, for metrics.json: every plain setting that differs from its default."""
    told: dict[str, object] = {}
    for group in settings:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            value = value.value if isinstance(value, enum.Enum) else value
            plain = isinstance(value, (bool, int, float, str, list)) and value != []
            if field.init and plain and field.name not in NOT_SETTINGS and value != field.default:
                # Where a folder lies is this machine's business; what it is called may help.
                is_place = isinstance(value, str) and Path(value).is_absolute()
                told[field.name] = Path(value).name if is_place else value
    return told


def report(
    trainer: Trainer,
    task: Task,
    splits: dict[str, PreparedSplit],
    run: RunArguments,
    evaluations: dict[str, dict[str, float]],
    seconds: float,
    settings: dict[str, object],
) -> None:
    """Prints and writes the results and, for a private run, the privacy statement."""
    output = Path(trainer.args.output_dir)
    spent = None
    if run.private:
        spent = PrivacySpent(
            epsilon_after=trainer.plan.epsilon_after,
            delta=trainer.plan.target_delta,
            steps=trainer.accountant.steps_spent,
            target_epsilon=trainer.plan.target_epsilon,
        )
        statement = trainer.privacy_statement()
        (output / "privacy_statement.json").write_text(statement.to_json() + "\n", encoding="utf-8")
        (output / "privacy_statement.md").write_text(statement.to_prose() + "\n", encoding="utf-8")
        print(f"\n{statement.to_prose()}\n")
    baselines = {name: task.baseline(splits[name].dataset) for name in evaluations} if task.baseline else {}
    history = trainer.state.log_history
    record = metrics_record(
        task=task,
        evaluations=evaluations,
        baselines=baselines,
        privacy=spent,
        steps=trainer.state.global_step,
        seconds=seconds,
        settings=settings,
    )
    write_json(output / "metrics.json", record)
    write_json(output / "log_history.json", history)
    if run.plots:
        draw_training(
            output / "training.png",
            history=history,
            task=task,
            baseline=baselines.get(task.validation_split),
            privacy=spent,
        )
    print("\n".join(summary_lines(record, task.metric_label)))
    print(f"written to {output}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        leave_ranks()
    except DPTrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
