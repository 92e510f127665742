"""Lengths of gradients: what all forms measure with.

Axes: B sample, T and S position, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of a Gram matrix computed at a time: enough for full matmul speed, small
# enough that skipping the upper triangle pays.
_GRAM_BLOCK = 64


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype for norms and sums: float32, or float64 where the tensors are float64."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in its accumulation dtype."""
    return tensor.to(accumulation_dtype(tensor))


@dataclass(frozen=True, eq=False)
class Measure:
    """How long one form's gradients are.

    Args:
        squares_B: ‖gradient‖² up to cancellation, (B,).
        spreads_B: Σ of the norms of the terms that add up to the gradient, (B,):
            what cancellation is measured against. Zero where nothing can cancel.
    """

    squares_B: Tensor
    spreads_B: Tensor


class GramCache:
    """The Gram matrix of the tensor measured last: query, key and value projections share their input.

    Holds one matrix, so it costs little memory.
    """

    def __init__(self) -> None:
        # Kept alive, so that no other tensor can take its memory and be taken for it.
        self._factor_BTD: Tensor | None = None
        self._blocks: list[Tensor] = []

    def blocks(self, factor_BTD: Tensor) -> list[Tensor]:
        """Returns the lower triangle of factor @ factorᵀ in blocks of rows; not to be written to."""
        if self._factor_BTD is None or not _same_memory(factor_BTD, self._factor_BTD):
            self._factor_BTD, self._blocks = factor_BTD, list(gram_blocks(wide(factor_BTD)))
        return self._blocks


def _same_memory(first: Tensor, second: Tensor) -> bool:
    return (first.data_ptr(), first.shape, first.stride(), first.dtype) == (
        second.data_ptr(),
        second.shape,
        second.stride(),
        second.dtype,
    )


def gram_blocks(factor_BTD: Tensor) -> Iterator[Tensor]:
    """Yields the lower triangle of factor @ factorᵀ in blocks of rows, each (B, rows, columns up to them)."""
    for start in range(0, factor_BTD.shape[1], _GRAM_BLOCK):
        stop = start + _GRAM_BLOCK
        yield torch.bmm(factor_BTD[:, start:stop], factor_BTD[:, :stop].mT)


def zero_dropped(tensor: Tensor, keep_B: Tensor) -> Tensor:
    """Zeroes dropped samples with ``where``: multiplying by zero would keep NaN and inf."""
    keep = keep_B.view(-1, *[1] * (tensor.ndim - 1))
    return torch.where(keep, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
