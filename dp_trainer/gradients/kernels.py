"""Norms on a GPU without a Gram matrix in memory, in Triton. Loaded by ``fused.py`` alone, where Triton is there.

Both kernels compute one tile of the lower triangle of sample b's Gram matrices per
program, multiply them where they are, in registers, and write two numbers. No
atomics: results do not depend on who comes first. Their tested twins are
``OuterProduct.gram_norms`` and ``RowScatter.summed_norms``.

Axes: B sample, T position, P first weight axis, D second, N tile of positions.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Positions of a tile; how much of their width is in registers at a time; how many such chunks are added before
# their sum goes to the total. Not tuned.
_POSITIONS = 64
_WIDTH = 32
_CHUNKS = 4


@triton.jit
def _gram_tile(
    factor, row, column, length, width, TILE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """One tile of factor @ factorᵀ of one sample, (TILE, TILE) in float32; zero beyond its length.

    A product of two chunks is a chain of additions, where a small tail after a large number would be lost. So
    chains are short, and their sums are added with what the last addition lost (Kahan's summation).
    """
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    upper_place = factor + rows[:, None].to(tl.int64) * width
    lower_place = factor + columns[:, None].to(tl.int64) * width
    gram = tl.zeros((TILE, TILE), dtype=tl.float32)
    lost = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, width, CHUNK * CHUNKS):
        part = tl.zeros((TILE, TILE), dtype=tl.float32)
        for chunk in tl.static_range(CHUNKS):
            places = start + chunk * CHUNK + tl.arange(0, CHUNK)
            inside = places[None, :] < width
            upper = tl.load(upper_place + places[None, :], mask=(rows[:, None] < length) & inside, other=0.0)
            lower = tl.load(
                lower_place + places[None, :], mask=(columns[:, None] < length) & inside, other=0.0
            )
            # "ieee": TensorFloat-32 would round a contribution. Products of half-precision numbers are exact either way.
            part = tl.dot(upper, tl.trans(lower), part, input_precision="ieee")
        added = part - lost
        total = gram + added
        lost = (total - gram) - added
        gram = total
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
    TILE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row, column, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if column <= row:
        products = _gram_tile(
            left + sample * length * left_width, row, column, length, left_width, TILE, CHUNK, CHUNKS
        ) * _gram_tile(
            right + sample * length * right_width, row, column, length, right_width, TILE, CHUNK, CHUNKS
        )
        _store_tile(products, products, squares, spreads, sample, row, column, TILE)


@triton.jit(do_not_specialize=["length"])
def _row_scatter_kernel(
    table_rows, values, squares, spreads, length, width,
    TILE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row, column, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if column <= row:
        upper, lower = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
        of_sample = table_rows + sample * length
        # What lies beyond the length has values of zero, so its rows do not matter.
        first = tl.load(of_sample + upper, mask=upper < length, other=-1)
        second = tl.load(of_sample + lower, mask=lower < length, other=-2)
        same = first[:, None] == second[None, :]
        gram = _gram_tile(values + sample * length * width, row, column, length, width, TILE, CHUNK, CHUNKS)
        _store_tile(tl.where(same, gram, 0.0), gram, squares, spreads, sample, row, column, TILE)


def outer_product_norms(left_BTP: Tensor, right_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ‖Σ_t left[b, t] ⊗ right[b, t]‖² and Σ_t ‖left[b, t]‖ ‖right[b, t]‖, both (B,), float32."""
    if left_BTP.shape[:2] != right_BTD.shape[:2]:
        raise ValueError(f"factors of {tuple(left_BTP.shape)} and {tuple(right_BTD.shape)}: positions differ")
    return _launch(_outer_product_kernel, left_BTP, right_BTD, left_BTP.shape[2], right_BTD.shape[2])


def row_scatter_norms(rows_BT: Tensor, values_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the squared norm of what ``values`` add to a table's ``rows``, and Σ_t ‖values[b, t]‖, both (B,)."""
    if rows_BT.shape != values_BTD.shape[:2]:
        raise ValueError(
            f"rows of {tuple(rows_BT.shape)} and values of {tuple(values_BTD.shape)}: positions differ"
        )
    return _launch(_row_scatter_kernel, rows_BT, values_BTD, values_BTD.shape[2])


def _launch(kernel: Any, first: Tensor, second: Tensor, *widths: int) -> tuple[Tensor, Tensor]:
    """Runs a kernel over all tiles of all samples, and adds up what they wrote."""
    batch, length = first.shape[:2]
    tiles = triton.cdiv(length, _POSITIONS)
    # Above the diagonal nothing is written.
    squares_BNN = torch.zeros(batch, tiles, tiles, dtype=torch.float32, device=first.device)
    spreads_BN = torch.zeros(batch, tiles, dtype=torch.float32, device=first.device)
    # Triton starts a kernel on the current device, which need not be the tensors'.
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[(tiles, tiles, batch)](
            first.contiguous(), second.contiguous(), squares_BNN, spreads_BN, length, *widths,
            TILE=_POSITIONS, CHUNK=_WIDTH, CHUNKS=_CHUNKS,
        )  # fmt: skip
    return squares_BNN.sum((1, 2)), spreads_BN.sum(1)
