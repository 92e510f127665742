"""Counts samples and tokens on their way to a Trainer, changing neither."""

from __future__ import annotations

import time
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback


class Counter:
    """A data collator that counts what passes."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator
        self.counts = (0, 0, 0)

    def __call__(self, samples: list[Any]) -> Any:
        """Collates; adds samples, real tokens and computed tokens to the counts."""
        batch = self._collator(samples)
        mask_BT = batch["attention_mask"]
        new = (len(samples), int(mask_BT.sum()), mask_BT.numel())
        self.counts = tuple(old + more for old, more in zip(self.counts, new, strict=True))
        return batch


class Clock(TrainerCallback):
    """Notes the time and the counts when the first step ends."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.first_step = 0.0
        self.counts = (0, 0, 0)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        """Called by the Trainer."""
        if state.global_step == 1:
            self.first_step, self.counts = time.perf_counter(), self._counter.counts


class Wrapped(Dataset[dict[str, Any]]):
    """Samples whose length cannot be seen from outside, so that nothing sorts by it."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"sample": self._samples[index]}
