"""Attacks a configured run: ``python scripts/audit.py --config configs/X.yaml [--key value …]``.

Sets up the run of that configuration, as ``scripts/finetune.py`` would, and holds
its claims against measurements in three layers:

    exact      contributions, noise and draws of logical batches, measured
    step       telling one release with a canary from one without
    one_run    many canaries, each in or out by a coin, in one training run

Writes audit.json, audit.md and audit.png into ``<output_dir>/audit``, and exits
with 0 if nothing contradicts the claimed ε, with 1 if something does, with 2 if
the audit could not be made. The cost is that of 1.25 × audit_releases + about 50
small steps, and of audit_steps steps on canaries: minutes on a CPU for the
quickstart. ``--audit_layers exact`` alone takes a fraction of that.
"""

from __future__ import annotations

import sys
from pathlib import Path

from finetune import SETTINGS, build_trainer
from transformers import set_seed

from dp_trainer.audit.arguments import AuditArguments
from dp_trainer.audit.report import prose, write_report
from dp_trainer.audit.run import audit
from dp_trainer.distributed import leave_ranks
from dp_trainer.errors import DPTrainerError
from dp_trainer.tasks import find_task
from dp_trainer.tasks.config import parse_configuration
from dp_trainer.tasks.images import with_classes
from dp_trainer.tasks.loading import load_rows, prepare_splits
from dp_trainer.tasks.models import load_model, load_processor
from dp_trainer.tasks.report import require_plotting


def main(argv: list[str]) -> int:
    """Parses, builds, attacks, reports; returns the exit code."""
    model_arguments, data, run, _, training, privacy, audit_arguments = parse_configuration(
        argv, (*SETTINGS, AuditArguments)
    )
    if run.plots:
        require_plotting()
    task = find_task(data.task, head=model_arguments.head)
    set_seed(training.seed)
    processor = load_processor(task, model_arguments)
    rows = load_rows(task, data)
    task = with_classes(task, rows)
    splits = prepare_splits(
        task, rows, processor, max_length=data.max_length, user_column=privacy.user_column
    )
    model = load_model(task, model_arguments, processor)
    trainer = build_trainer(task, model, processor, splits, training, privacy)
    print(trainer.plan, flush=True)

    report = audit(trainer, audit_arguments, quiet=training.disable_tqdm)

    if trainer.is_world_process_zero():
        files = write_report(report, Path(training.output_dir) / "audit", plot=run.plots)
        print("\n".join(["", *prose(report), "", f"written: {', '.join(map(str, files))}", report.verdict]))
    return int(bool(report.contradictions))


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        leave_ranks()
    except DPTrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
