"""Norms on a GPU without a Gram matrix in memory, in Triton. Loaded by ``fused.py`` alone, where Triton is there.

Both kernels compute one tile of the lower triangle of sample b's Gram matrices per
program, multiply them where they are, in registers, and write two numbers. No
atomics: results do not depend on who comes first. Their tested twins are
``OuterProduct.gram_norms`` and ``RowScatter.summed_norms``.

Axes: B sample, T position, P first weight axis, D second, N tile of positions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Positions of a tile, and how much of their width is in registers at a time. Not tuned.
_POSITIONS = 64
_WIDTH = 32


@triton.jit
def _gram_tile(
    factor, row, column, length, width, stride_t, stride_k, TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """One tile of factor @ factorᵀ of one sample, (TILE, TILE) in float32; zero beyond its length."""
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    gram = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, width, CHUNK):
        places = start + tl.arange(0, CHUNK)
        inside = places[None, :] < width
        upper = tl.load(
            factor + rows[:, None].to(tl.int64) * stride_t + places[None, :].to(tl.int64) * stride_k,
            mask=(rows[:, None] < length) & inside,
            other=0.0,
        )
        lower = tl.load(
            factor + columns[:, None].to(tl.int64) * stride_t + places[None, :].to(tl.int64) * stride_k,
            mask=(columns[:, None] < length) & inside,
            other=0.0,
        )
        # "ieee": TensorFloat-32 would round a contribution. Products of half-precision numbers are exact either way.
        gram = tl.dot(upper, tl.trans(lower), gram, input_precision="ieee")
    return gram


@triton.jit
def _store_tile(products, spread_squares, squares, spreads, sample, row, column, TILE: tl.constexpr):
    """Writes a tile's part of ‖gradient‖², what lies left of the diagonal twice, and of the spread."""
    tiles = tl.num_programs(0)
    place = (sample * tiles + row) * tiles + column
    tl.store(squares + place, tl.sum(products) * tl.where(row == column, 1.0, 2.0))
    if row == column:
        steps = tl.arange(0, TILE)
        on_diagonal = steps[:, None] == steps[None, :]
        lengths = tl.sqrt(tl.where(on_diagonal, spread_squares, 0.0))
        tl.store(spreads + sample * tiles + row, tl.sum(lengths))


@triton.jit(do_not_specialize=["length"])
def _outer_product_kernel(
    left, right, squares, spreads, length, left_width, right_width,
    left_b, left_t, left_k, right_b, right_t, right_k,
    TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, column, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if column <= row:
        products = _gram_tile(
            left + sample * left_b, row, column, length, left_width, left_t, left_k, TILE, CHUNK
        ) * _gram_tile(
            right + sample * right_b, row, column, length, right_width, right_t, right_k, TILE, CHUNK
        )
        _store_tile(products, products, squares, spreads, sample, row, column, TILE)


@triton.jit(do_not_specialize=["length", "rows_b"])
def _row_scatter_kernel(
    table_rows, values, squares, spreads, length, width, rows_b, rows_t, values_b, values_t, values_k,
    TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, column, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if column <= row:
        upper, lower = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
        of_sample = table_rows + sample * rows_b
        # Positions beyond the length get numbers that no row has, and that differ.
        first = tl.load(of_sample + upper.to(tl.int64) * rows_t, mask=upper < length, other=-1)
        second = tl.load(of_sample + lower.to(tl.int64) * rows_t, mask=lower < length, other=-2)
        same = first[:, None] == second[None, :]
        gram = _gram_tile(
            values + sample * values_b, row, column, length, width, values_t, values_k, TILE, CHUNK
        )
        _store_tile(tl.where(same, gram, 0.0), gram, squares, spreads, sample, row, column, TILE)


def outer_product_norms(left_BTP: Tensor, right_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ‖Σ_t left[b, t] ⊗ right[b, t]‖² and Σ_t ‖left[b, t]‖ ‖right[b, t]‖, both (B,), float32."""
    batch, length, _ = left_BTP.shape
    squares_BNN, spreads_BN, grid = _outputs(left_BTP, batch, length)
    with _on(left_BTP.device):
        _outer_product_kernel[grid](
            left_BTP, right_BTD, squares_BNN, spreads_BN, length, left_BTP.shape[2], right_BTD.shape[2],
            *left_BTP.stride(), *right_BTD.stride(), TILE=_POSITIONS, CHUNK=_WIDTH,
        )  # fmt: skip
    return squares_BNN.sum((1, 2)), spreads_BN.sum(1)


def row_scatter_norms(rows_BT: Tensor, values_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the squared norm of what ``values`` add to a table's ``rows``, and Σ_t ‖values[b, t]‖, both (B,)."""
    batch, length, width = values_BTD.shape
    squares_BNN, spreads_BN, grid = _outputs(values_BTD, batch, length)
    with _on(values_BTD.device):
        _row_scatter_kernel[grid](
            rows_BT, values_BTD, squares_BNN, spreads_BN, length, width,
            *rows_BT.stride(), *values_BTD.stride(), TILE=_POSITIONS, CHUNK=_WIDTH,
        )  # fmt: skip
    return squares_BNN.sum((1, 2)), spreads_BN.sum(1)


def _outputs(like: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Zeros for the tiles' squares, above the diagonal never written, room for spreads, and the grid."""
    tiles = triton.cdiv(length, _POSITIONS)
    squares_BNN = torch.zeros(batch, tiles, tiles, dtype=torch.float32, device=like.device)
    return (
        squares_BNN,
        torch.zeros(batch, tiles, dtype=torch.float32, device=like.device),
        (tiles, tiles, batch),
    )


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton starts a kernel on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
