"""Whether a norm is taken by a fused kernel or by PyTorch's operations: by trial, on the tensors at hand.

A kernel serves for a kind of norm (operation, dtypes, widths, length up to a factor of
two) once it has agreed with PyTorch's result on this device, in this process, and was
faster. Until then, where it is not, and for want of Triton, PyTorch's result is
used, so a kernel is never needed and never trusted unseen.

Axes: B sample, T position.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from importlib.util import find_spec
from statistics import median
from typing import TypeAlias, cast

import torch
from torch import Tensor

from dp_trainer.gradients.measures import GramCache

logger = logging.getLogger(__name__)

# The squares (B,) and the spreads (B,) of ``measures.Measure``.
Norms: TypeAlias = tuple[Tensor, Tensor]
Kernel: TypeAlias = Callable[[Tensor, Tensor], Norms]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How far squares may differ, as a share of the squared spread, and spreads, of themselves. Twice the rounding
# that ``forms.round_up`` allows for: either way may have that much.
_TOLERANCE = 1e-6
# Shorter samples have a Gram matrix that is nothing to keep, and a trial costs two waits.
_SHORTEST = 32
_TURNS = 3

# What each kind's trial found, for the life of the process.
_serves: dict[Hashable, bool] = {}


def norms(
    name: str,
    first: Tensor,
    second: Tensor,
    twin: Callable[[GramCache | None], Norms],
    grams: GramCache | None,
) -> Norms:
    """Returns ``twin(grams)``, or as much from the kernel ``name`` of ``kernels.py``, where that serves.

    Args:
        name: The kernel, called with both tensors.
        first: (B, T) or (B, T, …).
        second: The same of the other factor.
        twin: The same norms by PyTorch's operations.
        grams: Gram matrices that the twin may use again; its trial is without.
    """
    if not _is_possible(first, second):
        return twin(grams)
    kind = (
        *(name, first.device, first.dtype, second.dtype, first.shape[2:], second.shape[2:]),
        (first.shape[1] - 1).bit_length(),
    )
    if kind not in _serves:
        result = twin(grams)
        kernel = functools.partial(_kernel(name), first, second)
        _serves[kind] = _agrees_and_is_faster(name, kernel, functools.partial(twin, None), result)
        return result
    return _kernel(name)(first, second) if _serves[kind] else twin(grams)


def _is_possible(first: Tensor, second: Tensor) -> bool:
    """Whether kernels take these tensors: on an NVIDIA or AMD GPU, long enough, of a dtype that they sum in float32."""
    return (
        _runs_on(first.device)
        and first.shape[1] >= _SHORTEST
        and first.shape[0] > 0
        and all(tensor.dtype in _DTYPES for tensor in (first, second) if tensor.is_floating_point())
        and not (first.is_complex() or second.is_complex())
    )


def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernel(name: str) -> Kernel:
    from dp_trainer.gradients import kernels

    return cast(Kernel, getattr(kernels, name))


def _agrees_and_is_faster(
    name: str, kernel: Callable[[], Norms], twin: Callable[[], Norms], expected: Norms
) -> bool:
    """Runs both. A kernel that fails or disagrees is named in a warning and never asked again for this kind."""
    try:
        agrees = agree(kernel(), expected)
    except torch.OutOfMemoryError:
        return False
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver may raise; the twin's result stands
        logger.warning("%s: the fused kernel failed, PyTorch's operations are used instead: %s", name, error)
        return False
    if not agrees:
        logger.warning(
            "%s: the fused kernel's norms differ from those of PyTorch's operations, which are used instead.",
            name,
        )
        return False
    device = expected[0].device
    times = [(_seconds(kernel, device), _seconds(twin, device)) for _ in range(_TURNS)]
    return median(ours for ours, _ in times) < median(theirs for _, theirs in times)


def agree(found: Norms, expected: Norms) -> bool:
    """Whether two ways gave the same norms, rounding aside; samples that are not finite must not be so in both."""
    squares_B, spreads_B = found
    expected_B, expected_spreads_B = expected
    finite_B = expected_B.isfinite() & expected_spreads_B.isfinite()
    same_B = (squares_B - expected_B).abs() <= _TOLERANCE * expected_spreads_B.square()
    same_B &= (spreads_B - expected_spreads_B).abs() <= _TOLERANCE * expected_spreads_B
    return bool(torch.where(finite_B, same_B, ~(squares_B.isfinite() & spreads_B.isfinite())).all())


def _seconds(work: Callable[[], Norms], device: torch.device) -> float:
    """How long the device takes for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        start.record()
        work()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
