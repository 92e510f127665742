"""The DataLoader's worker processes: how one starts, and what is said when one dies."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from torch.utils.data import get_worker_info
from transformers.trainer_utils import seed_worker

from dp_trainer.errors import RunFaultError


def start_worker(worker_id: int, rank: int) -> None:
    """Seeds a worker as ``Trainer`` does, and lets it outlive the first SIGTERM.

    Schedulers send the signal to every process of a job. A worker that obeyed it
    would break the step that the main process wants to finish. The second one ends it.
    """
    info = get_worker_info()
    seed_worker(worker_id, num_workers=info.num_workers if info else 1, rank=rank)
    signal.signal(signal.SIGTERM, _outlive_the_first)


def _outlive_the_first(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def explained(*, steps_spent: int, step: int) -> Iterator[None]:
    """Says what a worker's death means for the run.

    Raises:
        RunFaultError: If a worker died while the next logical batch was made.
    """
    try:
        yield
    except RuntimeError as error:  # torch's own, from its handler of SIGCHLD or from waiting for the batch
        if "DataLoader worker" not in str(error):
            raise
        raise RunFaultError(
            f"train_dataset: a DataLoader worker died while it made the logical batch of step {step + 1} ({error}). "
            f"{steps_spent} steps are spent, that one is not. Look for a crash in the dataset or too little memory "
            f"for it; dataloader_num_workers=0 shows a crash where it happens. Then resume "
            "with resume_from_checkpoint=True."
        ) from error
