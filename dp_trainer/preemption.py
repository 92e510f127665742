"""A run that is asked to end saves first: SIGTERM, as schedulers send it before they take the machine.

The signal only sets a flag. The step under way is finished, so that the saved
weights and the count of steps agree; then a checkpoint is saved, training stops,
and the process exits as if the signal had ended it (143, 128 + 15), which tells
``sbatch --requeue`` scripts and shells alike that the run is to be resumed.

``TrainingArguments.enable_jit_checkpoint`` is not used for this: it also saves
between a release and the optimizer's step, when the step is spent already and the
weights do not show it; it takes the signal from construction on; and ``train``
returns as if all were done.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from dp_trainer.distributed import Ranks

logger = logging.get_logger(__name__)

EXIT_CODE = 128 + signal.SIGTERM


@contextlib.contextmanager
def saves_on_sigterm(trainer: Trainer) -> Iterator[None]:
    """Within, SIGTERM saves a checkpoint after the step under way and ends training.

    Guarantee: on leaving, the signal's handler and the arguments are as they were. A handler
    that somebody else installed is left in charge, as is everything outside the main thread.

    Raises:
        SystemExit: With 143, after such a checkpoint.
    """
    args = trainer.args
    is_main = threading.current_thread() is threading.main_thread()
    ours = is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    # All processes or none: those that watch ask each other at every step.
    if _is_set_anywhere(not ours, args):
        yield
        return
    before = args.save_total_limit, args.load_best_model_at_end
    callback = _SaveAndStop()
    trainer.add_callback(callback)
    signal.signal(signal.SIGTERM, callback.ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        trainer.remove_callback(callback)
        args.save_total_limit, args.load_best_model_at_end = before
    if callback.stopped_at is not None:
        logger.warning(
            f"SIGTERM: saved checkpoint-{callback.stopped_at} and stopped. Resume with resume_from_checkpoint=True."
        )
        raise SystemExit(EXIT_CODE)
    if callback.asked:
        # After the last step: training ended by itself, and the signal does now what it would have done.
        signal.raise_signal(signal.SIGTERM)


class _SaveAndStop(TrainerCallback):  # type: ignore[misc]
    """Turns a request into a save and a stop, at the end of a step, in all processes at the same one."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped_at: int | None = None

    def ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _is_set_anywhere(self.asked, args):
            self.stopped_at = state.global_step
            control.should_training_stop = control.should_save = True
            # Little time is left, and save_strategy="best" would let the evaluation cancel the save.
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped_at is not None:
            control.should_save = control.should_evaluate = False
            # At the end of training these would load the best checkpoint, and delete the one just saved.
            args.save_total_limit, args.load_best_model_at_end = None, False


def _is_set_anywhere(flag: bool, args: TrainingArguments) -> bool:
    """Whether the flag is set in any process: one that saved alone would wait for the others forever."""
    return flag if args.world_size == 1 else Ranks.current(args.device).most(int(flag)) > 0
