"""Makes gradient checkpointing's second forward pass run under the capture.

Recomputation happens inside the backward pass. There the capture's function mode
is off: on a GPU because it is another thread, on a CPU because ``backward`` is
itself a torch function that the mode sees, and a mode is off in its own handler.
Non-reentrant checkpointing takes a context for the recomputation; here it enters
the capture again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from dp_trainer.errors import UnsupportedOperationError

_ATTRIBUTE = "_gradient_checkpointing_func"


@contextlib.contextmanager
def recomputation_under(model: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    """While inside, checkpointed blocks of a transformers model recompute under ``mode``.

    Raises:
        UnsupportedOperationError: For reentrant checkpointing, whose inner
            backward pass puts gradients where no capture sees them.
    """

    def contexts() -> tuple[Any, Any]:
        # The mode itself, since a block may be recomputed more than once.
        return contextlib.nullcontext(), mode

    changed: list[tuple[nn.Module, Any]] = []
    try:
        for path, module in model.named_modules():
            function = getattr(module, _ATTRIBUTE, None)
            if function is None or not getattr(module, "gradient_checkpointing", False):
                continue
            settings = function.keywords if isinstance(function, functools.partial) else {}
            if settings.get("use_reentrant", True):
                raise UnsupportedOperationError(
                    f"{path or 'the model'}: reentrant gradient checkpointing hides gradients from the capture. "
                    "Set gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            changed.append((module, function))
            setattr(module, _ATTRIBUTE, functools.partial(function, context_fn=contexts))
        yield
    finally:
        for module, function in changed:
            setattr(module, _ATTRIBUTE, function)
