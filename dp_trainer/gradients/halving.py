"""Goes on with smaller micro-batches where memory runs out.

Only the grouping of the drawn samples changes: the sampling probability, the
noise, the divisor and the count of steps do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

from dp_trainer.batches import micro_batch_size, select
from dp_trainer.gradients.parts import MicroBatch

logger = logging.get_logger(__name__)

_Result = TypeVar("_Result")


class Halving:
    """How often micro-batches are halved, from one logical batch to the next.

    Guarantee: an attempt that runs out of memory counts for nothing; the next
    one sees the same samples, each once, in smaller micro-batches.

    Args:
        allowed: Off where ranks have to make equally many forward passes.
    """

    def __init__(self, *, allowed: bool = True) -> None:
        self.allowed = allowed
        self._times = 0

    def run(
        self, micro_batches: Sequence[MicroBatch], attempt: Callable[[Iterable[MicroBatch]], _Result]
    ) -> _Result:
        """Returns what ``attempt`` makes of the micro-batches, halved as often as memory asks for.

        Args:
            micro_batches: The logical batch.
            attempt: Must keep nothing of a failed call.

        Raises:
            RuntimeError: The device's own error, if one sample by itself does not fit.
        """
        while True:
            try:
                return attempt(self._pieces(micro_batches))
            except RuntimeError as error:
                largest = max((micro_batch_size(m) for m in micro_batches), default=0)
                if not _is_out_of_memory(error) or largest <= 2**self._times:
                    raise
                if not self.allowed:
                    logger.warning(
                        "Out of memory: ranks of a sharded model must stay in step, so one of them cannot go on with "
                        "smaller micro-batches. Lower per_device_train_batch_size or micro_batch_tokens."
                    )
                    raise
            # Outside the handler: its traceback would keep the failed attempt's tensors alive.
            self._times += 1
            clear_device_cache(garbage_collection=True)
            logger.warning(
                f"Out of memory: going on with micro-batches of at most {-(-largest // 2**self._times)} samples "
                f"instead of {largest}. The logical batch, its noise and its ε stay as they are. Set "
                "per_device_train_batch_size or micro_batch_tokens lower to save the failed attempts."
            )

    def _pieces(self, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        for micro_batch in micro_batches:
            size = micro_batch_size(micro_batch)
            length = -(-size // 2**self._times)
            if length == size:
                yield micro_batch
                continue
            for start in range(0, size, length):
                yield select(micro_batch, list(range(start, min(start + length, size))))


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
