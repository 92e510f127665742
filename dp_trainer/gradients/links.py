"""Recognizes how one torch call made a derived tensor from others.

What is not recognized is ``Link.GENERAL``, which is exact too, only dearer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_trainer.gradients.derived import Derived, Link

_SAME = frozenset(
    {
        *(Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type),
        *(Tensor.contiguous, Tensor.clone, torch.clone, Tensor.cpu, Tensor.cuda),
    }
)
_ADDING = frozenset(
    {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__}
)
_TRANSPOSING = frozenset(
    {
        *(Tensor.t, torch.t, *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H"))),
        *(Tensor.transpose, torch.transpose, Tensor.swapaxes, Tensor.permute, torch.permute),
    }
)
_EXPANDING = frozenset({Tensor.expand, torch.broadcast_to, Tensor.broadcast_to})
_REPEATING = frozenset({Tensor.repeat, torch.tile, Tensor.tile})


def describe(
    func: Any, args: Any, kwargs: Any, output: Tensor, rooted: list[Derived], *, batch_first: bool = False
) -> Derived:
    """Describes how ``output`` came from the derived tensors among the arguments.

    ``batch_first``: whether a constant among them has a first axis that may run over the samples.
    """
    if not output.requires_grad:
        return Derived(output, ())
    roots = tuple(dict.fromkeys(name for derived in rooted for name in derived.roots))
    base = rooted[0] if len(rooted) == 1 else None
    inherited = batch_first or any(derived.batch_first for derived in rooted)
    if func in _REPEATING and output.ndim and output.shape[0] > rooted[0].tensor.shape[:1].numel():
        inherited = True
    general = Derived(output, roots, Link.GENERAL, batch_first=inherited)
    if base is None:
        return general
    same_shape = output.shape == base.tensor.shape
    if same_shape and (func in _SAME or (func in _ADDING and base.tensor is args[0])):
        return Derived(output, roots, Link.SAME, base, batch_first=inherited)
    if func in _TRANSPOSING and _swaps_last_axes(output, base.tensor):
        return Derived(output, roots, Link.TRANSPOSED, base, batch_first=inherited and output.ndim == 3)
    if func is Tensor.__getitem__ and base.tensor is args[0] and type(args[1]) is int and output.ndim == 2:
        return Derived(output, roots, Link.SLOT, base, slot=args[1] % base.tensor.shape[0])
    if (func in _EXPANDING and _adds_leading(output.shape, base.tensor.shape)) or (
        func in _REPEATING and _only_leading(output.shape, base.tensor.shape)
    ):
        return Derived(output, roots, Link.EXPANDED, base, batch_first=True)
    picked = func is Tensor.__getitem__ and base.tensor is args[0] and base.tensor.ndim == 2
    if picked and isinstance(args[1], Tensor) and args[1].dtype == torch.long and args[1].ndim > 0:
        rows = args[1] % base.tensor.shape[0]
        return Derived(output, roots, Link.ROWS, base, rows=rows, batch_first=args[1].ndim > 1)
    if func is F.embedding and len(args) <= 3 and args[1] is base.tensor and base.tensor.ndim == 2:
        first_axis = args[0].ndim > 1
        if any(kwargs.get(flag) for flag in ("max_norm", "scale_grad_by_freq", "sparse")):
            return dataclasses.replace(general, batch_first=first_axis)
        padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
        padding_row = None if padding is None else padding % base.tensor.shape[0]
        return Derived(
            output, roots, Link.ROWS, base, rows=args[0], padding_row=padding_row, batch_first=first_axis
        )
    return general


def _swaps_last_axes(output: Tensor, base: Tensor) -> bool:
    """Whether ``output`` is a view of ``base``, of two or three axes, with the last two swapped."""
    if output.ndim != base.ndim or base.ndim not in (2, 3):
        return False
    # Strides tell axes of the same length apart.
    return (output.shape, output.stride()) == (base.mT.shape, base.mT.stride())


def _adds_leading(shape: torch.Size, base: torch.Size) -> bool:
    """Whether a broadcast of ``base`` to ``shape`` gives it another first axis."""
    return len(shape) > len(base) or (len(base) > 0 and base[0] == 1 != shape[0])


def _only_leading(shape: torch.Size, base: torch.Size) -> bool:
    """Whether ``shape`` repeats ``base`` along one leading axis and nowhere else."""
    return (len(shape) > 0 and shape[1:] == base) or (
        len(shape) == len(base) and base[0] == 1 and shape[1:] == base[1:]
    )
