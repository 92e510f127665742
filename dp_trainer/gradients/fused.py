"""Whether a norm is taken by a fused kernel or by PyTorch's operations: by trial.

A kernel serves for a kind of norm (operation, device, dtypes, widths) once it was
right in this process, against float64 on made-up tensors that leave no place to
hide, and was faster on real ones of that length. Until then, where it is not, and for want of
Triton, PyTorch's result is used: a kernel is never needed and never trusted unseen.

Axes: B sample, T position.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from importlib.util import find_spec
from statistics import median
from typing import TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from dp_trainer.gradients.measures import GramCache, rounding_of_products

logger = logging.getLogger(__name__)

# The squares (B,) and the spreads (B,) of ``measures.Measure``.
Norms: TypeAlias = tuple[Tensor, Tensor]
Kernel: TypeAlias = Callable[[Tensor, Tensor], Norms]
_Result = TypeVar("_Result")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Shorter samples have a Gram matrix that is nothing to keep.
_SHORTEST = 32
# A grid's third axis has no more places.
_LARGEST_BATCH = 65535
_TURNS = 3
# Positions of a trial: more than a tile of 64, so that its end is tried as well.
_TRIED_POSITIONS = 66
# What a trial allows, in units of the last place of a squared spread: half of what ``forms.round_up`` adds.
_ROUNDING = 2.0
# And of the square itself: each of so many additions in a row may lose so much of a small tail after a large number.
_LOST_IN_A_CHAIN = 0.5
_LONGEST_CHAIN = 128

# What trials found, for the life of the process.
_right: dict[Hashable, bool] = {}
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
        first: (B, T, …), or rows (B, T).
        second: (B, T, …).
        twin: The same norms by PyTorch's operations, never too small.
        grams: Gram matrices that the twin may use again.
    """
    if not _is_possible(first, second):
        return twin(grams)
    kind = (name, first.device, first.dtype, second.dtype, first.shape[2:], second.shape[2:])
    here = (*kind, (first.shape[1] - 1).bit_length())
    if here not in _serves:
        result = twin(grams)
        if kind not in _right:
            _right[kind] = _attempt(name, lambda: is_right(name, _kernel(name), first, second)) or False
        faster = _right[kind] and _attempt(name, lambda: _is_faster(name, first, second, twin))
        _serves[here] = bool(faster)
        return result
    found = _attempt(name, lambda: _rounded_up(_kernel(name), first, second)) if _serves[here] else None
    if found is None:
        _serves[here] = False
        return twin(grams)
    return found


def _is_possible(first: Tensor, second: Tensor) -> bool:
    """Whether kernels take these tensors: on a GPU, long enough, of dtypes that they sum in float32."""
    return (
        _runs_on(first.device)
        and second.device == first.device
        and second.shape[:2] == first.shape[:2]
        and first.shape[1] >= _SHORTEST
        and 0 < first.shape[0] <= _LARGEST_BATCH
        and first.shape[2:].numel() * second.shape[2:].numel() > 0
        and second.dtype in _DTYPES
        and first.dtype in (_DTYPES if first.ndim == 3 else (torch.int64, torch.int32))
        # The compiler makes another kernel of tensors that begin elsewhere, which nobody has tried.
        and all(not t.is_contiguous() or t.data_ptr() % 16 == 0 for t in (first, second))
        # Who wins a race is chance.
        and not torch.are_deterministic_algorithms_enabled()
    )


def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernel(name: str) -> Kernel:
    from dp_trainer.gradients import kernels

    return cast(Kernel, getattr(kernels, name))


def _attempt(name: str, work: Callable[[], _Result]) -> _Result | None:
    """Returns what the work returns; None, after a warning, if it fails in any way: PyTorch's result stands."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - whatever an import, a compiler or a driver may raise
        logger.warning("%s: the fused kernel failed, PyTorch's operations are used instead: %s", name, error)
        return None


def _rounded_up(kernel: Kernel, first: Tensor, second: Tensor) -> Norms:
    """The kernel's norms, never too small."""
    squares_B, spreads_B = kernel(first, second)
    factors = [tensor for tensor in (first, second) if tensor.is_floating_point()]
    return squares_B * (1 + rounding_of_products(*factors)), spreads_B


def is_right(name: str, kernel: Kernel, first: Tensor, second: Tensor) -> bool:
    """Whether a kernel agrees with float64 on tensors of these widths and dtypes, warning where it does not.

    Positions that are alike, so that nothing left out goes unseen; that have nothing in common; with one large
    number and a long tail; and a sample that is not finite, which must stay so and stay alone.
    """
    for kinds in (("alike", "normal"), ("tail", "nan"), ("normal", "tail")):
        samples = [_made_up(kind, first, second) for kind in kinds]
        one, other = (torch.stack(tensors) for tensors in zip(*samples, strict=True))
        squares_B, spreads_B = _rounded_up(kernel, one, other)
        exact_B, exact_spreads_B = _exact(one, other)
        factors = [tensor for tensor in (one, other) if tensor.is_floating_point()]
        chains = sum(_LOST_IN_A_CHAIN * min(factor.shape[2], _LONGEST_CHAIN) for factor in factors)
        unit = torch.finfo(torch.float32).eps
        below_B = unit * (_ROUNDING * exact_spreads_B.square() + chains * exact_B)
        above_B = below_B + (1e-4 + rounding_of_products(*factors)) * exact_B
        right_B = (squares_B >= exact_B - below_B) & (squares_B <= exact_B + above_B)
        right_B &= (spreads_B - exact_spreads_B).abs() <= 1e-4 * exact_spreads_B
        finite_B = exact_B.isfinite()
        if not torch.where(finite_B, right_B, ~squares_B.isfinite()).all():
            logger.warning(
                "%s: the fused kernel's norms are wrong on %s for %s and %s, PyTorch's operations are used instead.",
                name, first.device, first.dtype, second.dtype,
            )  # fmt: skip
            return False
    return True


def _made_up(kind: str, *like: Tensor) -> list[Tensor]:
    """One sample's tensors of a trial, (T, …), of these tensors' dtypes, widths and device."""
    made = []
    for place, tensor in enumerate(like):
        # A generator of its own: the model's dropout draws from the others.
        draws = torch.Generator(tensor.device).manual_seed(place)
        shape = (_TRIED_POSITIONS, *tensor.shape[2:])
        if not tensor.is_floating_point():
            made.append(torch.randint(0, 9, shape, generator=draws, device=tensor.device).to(tensor.dtype))
            continue
        numbers = torch.randn(shape, generator=draws, device=tensor.device)
        if kind == "alike":
            numbers = numbers[:1] + 0.1 * numbers
        if kind == "tail":
            numbers = torch.full_like(numbers, 2e-4)
            numbers[:, 0] = 1
        if kind == "nan":
            numbers[-1, -1] = float("nan")
        made.append(numbers.to(tensor.dtype))
    return made


def _exact(first: Tensor, second: Tensor) -> Norms:
    """Both kernels' norms in float64, by whole Gram matrices."""
    products_BTT = second.double() @ second.double().mT
    if first.is_floating_point():
        products_BTT *= first.double() @ first.double().mT
    spreads_B = products_BTT.diagonal(dim1=1, dim2=2).sqrt().sum(1)
    if not first.is_floating_point():
        products_BTT = products_BTT.where(first[:, :, None] == first[:, None, :], 0.0)
    return products_BTT.sum((1, 2)), spreads_B


def _is_faster(name: str, first: Tensor, second: Tensor, twin: Callable[[GramCache | None], Norms]) -> bool:
    """Whether the kernel is faster on these tensors; the twin has no Gram matrices to use again."""
    kernel = functools.partial(_rounded_up, _kernel(name), first, second)
    kernel()
    times = [
        (_seconds(kernel, first.device), _seconds(functools.partial(twin, None), first.device))
        for _ in range(_TURNS)
    ]
    return median(ours for ours, _ in times) < median(theirs for _, theirs in times)


def _seconds(work: Callable[[], Norms], device: torch.device) -> float:
    """How long the device takes for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        start.record()
        work()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
