"""Lengths of gradients: what all forms measure with.

Axes: B sample, T and S position, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of a Gram matrix computed at a time. On a CPU: enough for full matmul speed, small enough that skipping the
# upper triangle pays. Elsewhere a block costs several launches, which 64 rows would not be worth (an estimate).
_GRAM_BLOCK = 64
_GRAM_BLOCK_OFF_CPU = 512
# So many numbers are squared and added one after the other at most, and so much of a factor's width in one product.
# Each addition rounds at the size of what was added before: a small tail after a large number is lost.
_PIECE = 256
_PANEL = 1024
# What that may cost still, in units of the last place of a squared norm: of a sum of squares, where 22 were found in
# spikes with tails, and for each addition of a product, whose panel may be one chain: 495 were found for 1024.
_ROUNDING_OF_LENGTHS = 32.0
_ROUNDING_OF_ADDITION = 0.5


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype for norms and sums: float32, or float64 where the tensors are float64."""
    return _promoted(*(tensor.dtype for tensor in tensors))


@functools.cache
def _promoted(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds these and float32; asked a thousand times a step, with few different arguments."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in its accumulation dtype."""
    return tensor.to(accumulation_dtype(tensor))


def batched_product(left_BXK: Tensor, right_BKY: Tensor) -> Tensor:
    """Returns left @ right of each sample, (B, X, Y), summed and returned in the accumulation dtype."""
    if _has_wide_sums(left_BXK, right_BKY):
        return torch.bmm(left_BXK, right_BKY, out_dtype=torch.float32)
    return torch.bmm(wide(left_BXK), wide(right_BKY))


def weighted_product(left_BTP: Tensor, right_BTD: Tensor, factors_B: Tensor, total: Tensor | None) -> Tensor:
    """Returns ``total + Σ_b,t factors[b] · left[b, t] ⊗ right[b, t]``, (P, D); writes into ``total`` if given.

    Guarantee: products and sums are in the accumulation dtype, and so are weighted
    rows; only where ``splits_weights`` are these ``ROUNDING_OF_WEIGHTS`` times as coarse.
    """
    # The narrower factor is scaled: less memory, less work.
    left_is_scaled = left_BTP.shape[2] < right_BTD.shape[2]
    scaled, kept = (left_BTP, right_BTD) if left_is_scaled else (right_BTD, left_BTP)
    exact = (wide(scaled) * factors_B.to(accumulation_dtype(scaled))[:, None, None]).flatten(0, 1)
    other = kept.flatten(0, 1)
    if splits_weights(left_BTP, right_BTD):
        # The fast units take bfloat16 only, of fewer digits: the rest goes through them as well.
        pieces = split_in_halves(exact)
        exact, other = torch.cat(pieces), torch.cat([other] * len(pieces))
        left, right = (exact, other) if left_is_scaled else (other, exact)
        product = torch.mm(left.T, right, out_dtype=torch.float32)
        return product if total is None else total.add_(product)
    left, right = (exact, wide(other)) if left_is_scaled else (wide(other), exact)
    return left.T @ right if total is None else total.addmm_(left.T, right)


# A sum of two bfloat16 numbers leaves 2⁻¹⁷ of a float32 number, which is 64 units of its last place.
ROUNDING_OF_WEIGHTS = 64.0


def splits_weights(left: Tensor, right: Tensor) -> bool:
    """Whether ``weighted_product`` puts weighted rows through half-precision products, in two pieces."""
    return _has_wide_sums(left, right) and left.dtype == torch.bfloat16


def split_in_halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two bfloat16 tensors whose sum is the float32 tensor but for 2⁻¹⁷ of each entry."""
    upper = tensor.to(torch.bfloat16)
    return upper, (tensor - upper).to(torch.bfloat16)


def _has_wide_sums(first: Tensor, second: Tensor) -> bool:
    """Whether the device multiplies these in half precision, exactly, and sums in float32.

    Products of two half-precision numbers fit in float32, so nothing is lost against
    converting first, and the device's half-precision units can be used.
    """
    halves = first.dtype in (torch.bfloat16, torch.float16) and first.dtype == second.dtype
    return halves and first.is_cuda


@dataclass(frozen=True, eq=False)
class Measure:
    """How long one form's gradients are.

    Args:
        squares_B: ‖gradient‖² up to cancellation, (B,).
        spreads_B: Σ of the norms of the terms that add up to the gradient, (B,):
            what cancellation is measured against. None for one stored gradient, where nothing can cancel.
    """

    squares_B: Tensor
    spreads_B: Tensor | None


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
            self._factor_BTD, self._blocks = factor_BTD, list(gram_blocks(factor_BTD))
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
    if not _has_wide_sums(factor_BTD, factor_BTD):
        factor_BTD = wide(factor_BTD)  # once, not for each block
    rows = _GRAM_BLOCK if factor_BTD.device.type == "cpu" else _GRAM_BLOCK_OFF_CPU
    for start in range(0, factor_BTD.shape[1], rows):
        stop = start + rows
        yield product_of_positions(factor_BTD[:, start:stop], factor_BTD[:, :stop])


def product_of_positions(first_BTD: Tensor, second_BSD: Tensor) -> Tensor:
    """Returns first @ secondᵀ, (B, T, S); of a wide factor, as a head's with its vocabulary, the sum over panels."""
    width = first_BTD.shape[2]
    total = batched_product(first_BTD[:, :, :_PANEL], second_BSD[:, :, :_PANEL].mT)
    for start in range(_PANEL, width, _PANEL):
        panel = slice(start, start + _PANEL)
        total += batched_product(first_BTD[:, :, panel], second_BSD[:, :, panel].mT)
    return total


def rounding_of_products(*factors: Tensor) -> float:
    """By which share squares are rounded up that Gram matrices of these factors give.

    Enough for what products can lose of long tails, see ``_PIECE``, however a device adds up a panel. What rounds
    up and down alike is no part of it: ``forms.round_up``.
    """
    unit = torch.finfo(accumulation_dtype(*factors)).eps
    widths = [factor.shape[2] for factor in factors]
    return unit * _ROUNDING_OF_ADDITION * sum(min(width, _PANEL) + width // _PANEL for width in widths)


def squared_lengths(rows_BK: Tensor) -> Tensor:
    """Returns ‖row‖² of each row, (B,), in the accumulation dtype, never below the true one.

    In pieces: a CPU's ``vector_norm`` adds one square after the other, 8 or 16 at a time. For 38 million
    Gaussian numbers, an embedding's gradient, it was 0.3 % too short, for other numbers 2 %.
    """
    rows = wide(rows_BK).flatten(1).contiguous()  # of numbers that lie apart a longer chain would be made
    pieces = rows.shape[1] // _PIECE
    end = pieces * _PIECE
    lengths_BN = torch.linalg.vector_norm(rows[:, :end].reshape(len(rows), pieces, _PIECE), dim=2)
    # A sum adds in the shape of a tree.
    squares_B: Tensor = lengths_BN.square().sum(1) + rows[:, end:].square().sum(1)
    return squares_B * (1 + _ROUNDING_OF_LENGTHS * torch.finfo(rows.dtype).eps)


def zero_dropped(tensor: Tensor, keep_B: Tensor) -> Tensor:
    """Zeroes dropped samples with ``where``: multiplying by zero would keep NaN and inf."""
    keep = keep_B.view(-1, *[1] * (tensor.ndim - 1))
    return torch.where(keep, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
