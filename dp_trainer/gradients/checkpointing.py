"""Makes gradient checkpointing's second forward pass run under the capture.

Recomputation happens inside the backward pass. There the capture's function mode
is off: on a GPU because it is another thread, on a CPU because ``backward`` is
itself a torch function that the mode sees, and a mode is off in its own handler.
Non-reentrant checkpointing takes a context for the recomputation; here every one
of them, whoever asked for it, enters the capture again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.utils.checkpoint
from torch import nn
from torch.overrides import TorchFunctionMode

from dp_trainer.errors import UnsupportedOperationError

# What ``torch.utils.checkpoint.checkpoint`` looks up at each call, however it was imported itself.
_GENERATOR = "_checkpoint_without_reentrant_generator"


def refuse_reentrant(model: nn.Module) -> None:
    """Refuses a transformers model with reentrant checkpointing.

    Raises:
        UnsupportedOperationError: Its inner backward pass puts gradients where no capture sees them,
            and ``torch.autograd.grad`` does not work through it.
    """
    for path, module in model.named_modules():
        # Only plain attributes: on a module, ``getattr`` of a missing one builds an error.
        attributes = vars(module)
        settings = getattr(attributes.get("_gradient_checkpointing_func"), "keywords", {})
        if settings.get("use_reentrant") is True and getattr(module, "gradient_checkpointing", False):
            raise UnsupportedOperationError(
                f"{path or 'the model'}: reentrant gradient checkpointing hides gradients from the capture. "
                "Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


@contextlib.contextmanager
def recomputation_under(model: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    """While inside, checkpointed blocks recompute under ``mode``.

    Raises:
        UnsupportedOperationError: For a transformers model with reentrant checkpointing.
    """
    refuse_reentrant(model)
    original = getattr(torch.utils.checkpoint, _GENERATOR)

    def generator(
        fn: Any, preserve_rng_state: bool = True, context_fn: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        given = context_fn or torch.utils.checkpoint.noop_context_fn

        def contexts() -> tuple[Any, Any]:
            forward, recomputation = given()
            return forward, _Both(recomputation, mode)

        return original(fn, preserve_rng_state, contexts, *args, **kwargs)

    setattr(torch.utils.checkpoint, _GENERATOR, generator)
    try:
        yield
    finally:
        setattr(torch.utils.checkpoint, _GENERATOR, original)


def saves_memory(model: nn.Module) -> bool:
    """Whether gradient checkpointing of a transformers model is on, and in effect."""
    return any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )


class _Both:
    """Two contexts as one that can be entered again, since a block may be recomputed more than once."""

    def __init__(self, first: Any, second: Any) -> None:
        self._first, self._second = first, second

    def __enter__(self) -> None:
        self._first.__enter__()
        self._second.__enter__()

    def __exit__(self, *details: Any) -> None:
        self._second.__exit__(*details)
        self._first.__exit__(*details)
