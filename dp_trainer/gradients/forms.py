"""What one parameter's per-sample gradients are made of, and all mathematics on them.

An operation rule never computes with gradients: it returns a form. Five forms
(one in ``slots.py``, two in ``stored.py``) cover every use of a parameter. Each knows its norm and its weighted sum; inner
products and all that concerns several forms are here. All in float32 at least, whatever the dtype of the tensors.

Norms never fall below the true ones. A Gram product sums terms as large as the
square of ``Σ_t ‖left[t]‖ ‖right[t]‖``, the *spread*, and where the gradient itself
is far smaller, they cancel and leave rounding. So a multiple of that rounding
is added, invisible in ordinary gradients, and where it would be visible the
gradient is built instead.

Axes: B sample, T and S position, P first weight axis, D second weight axis,
V row of a table, K any trailing axes of a parameter.

Source: the ghost norm of Goodfellow 2015 (arXiv 1510.01799) and Li et al. 2021
(arXiv 2110.05679); the cross terms of shared parameters follow from
``‖Σ g_u‖² = Σ ‖g_u‖² + 2 Σ ⟨g_u, g_v⟩``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dp_trainer.gradients.fused import Norms, norms
from dp_trainer.gradients.measures import (
    ROUNDING_OF_WEIGHTS,
    GramCache,
    Measure,
    accumulation_dtype,
    batched_product,
    gram_blocks,
    product_of_positions,
    rounding_of_products,
    splits_weights,
    squared_lengths,
    weighted_product,
    wide,
    zero_dropped,
)
from dp_trainer.gradients.slots import SlottedOuterProduct
from dp_trainer.gradients.stored import Materialized, MaterializedInBlocks

# Rounding of a sum of products, in units of the last place of its largest term.
_ROUNDING = 4.0
# A squared norm smaller than this many units of the squared spread's last place is mostly rounding.
_TRUSTED = 1e3


@dataclass(frozen=True, eq=False)
class OuterProduct:
    """Sample b's gradient is ``Σ_t left[b, t] ⊗ right[b, t]``, of shape (P, D).

    Args:
        left_BTP: Factors along the parameter's first axis.
        right_BTD: Factors along its second axis.
    """

    left_BTP: Tensor
    right_BTD: Tensor

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape, (P, D)."""
        return torch.Size((self.left_BTP.shape[2], self.right_BTD.shape[2]))

    def dense(self) -> Tensor:
        """Returns the gradients themselves, (B, P, D)."""
        return batched_product(self.left_BTP.mT, self.right_BTD)

    def measure(self, grams: GramCache | None = None) -> Measure:
        """Returns ‖gradient‖² up to cancellation, from the Gram matrices of both factors, and the spread."""
        left = self.left_BTP
        if left.shape[1] == 1:
            # Squares would underflow where their roots' product does not.
            norms_B = squared_lengths(left).sqrt() * squared_lengths(self.right_BTD).sqrt()
            return Measure(norms_B.square(), norms_B)
        if not left.shape[1]:
            zeros_B = left.new_zeros(left.shape[0], dtype=accumulation_dtype(left, self.right_BTD))
            return Measure(zeros_B, zeros_B)
        return Measure(*norms("outer_product_norms", left, self.right_BTD, self.gram_norms, grams))

    def gram_norms(self, grams: GramCache | None = None) -> Norms:
        """The same by PyTorch's operations, for one position or more."""
        squares: list[Tensor] = []
        spreads: list[Tensor] = []
        grams = GramCache() if grams is None else grams
        for left_BXS, right_BXS in zip(gram_blocks(self.left_BTP), grams.blocks(self.right_BTD), strict=True):
            products_BXS = left_BXS.mul_(right_BXS)
            start = products_BXS.shape[2] - products_BXS.shape[1]
            squares.append(products_BXS[:, :, start:].sum((1, 2)))
            if start:
                # Both Gram matrices are symmetric: what lies left of the diagonal block counts twice.
                squares.append(2 * products_BXS[:, :, :start].sum((1, 2)))
            # On the diagonal stands (‖left[t]‖ ‖right[t]‖)².
            spreads.append(products_BXS[:, :, start:].diagonal(dim1=1, dim2=2).sqrt().sum(1))
        squares_B = functools.reduce(torch.add, squares) * (
            1 + rounding_of_products(self.left_BTP, self.right_BTD)
        )
        return squares_B, functools.reduce(torch.add, spreads)

    def select(self, keep_B: Tensor) -> OuterProduct:
        """Returns the form with exact zeros for samples that are not kept."""
        return OuterProduct(zero_dropped(self.left_BTP, keep_B), zero_dropped(self.right_BTD, keep_B))

    def transposed(self) -> OuterProduct:
        """Returns the form of the transposed parameter, (D, P)."""
        return OuterProduct(self.right_BTD, self.left_BTP)

    def weighted_sum(self, factors_B: Tensor, total: Tensor | None) -> Tensor:
        """Returns ``total + Σ_b factors[b] · gradient[b]``, (P, D); writes into ``total`` if given."""
        return weighted_product(self.left_BTP, self.right_BTD, factors_B, total)


@dataclass(frozen=True, eq=False)
class RowScatter:
    """Sample b's gradient adds ``values[b, t]`` to row ``rows[b, t]`` of a table.

    Args:
        rows_BT: Row numbers, integers in [0, number_of_rows).
        values_BTD: What is added.
        number_of_rows: V, the table's height.
    """

    rows_BT: Tensor
    values_BTD: Tensor
    number_of_rows: int

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape, (V, D)."""
        return torch.Size((self.number_of_rows, self.values_BTD.shape[2]))

    def dense(self) -> Tensor:
        """Returns the gradients themselves, (B, V, D)."""
        values = wide(self.values_BTD)
        batch, _, width = values.shape
        offsets = torch.arange(batch, device=values.device)[:, None] * self.number_of_rows
        table = values.new_zeros(batch * self.number_of_rows, width)
        table.index_add_(0, (self.rows_BT + offsets).flatten(), values.flatten(0, 1))
        return table.view(batch, self.number_of_rows, width)

    def measure(self, _grams: GramCache | None = None) -> Measure:
        """Returns ‖gradient‖², values that share a row added before the norm, and the spread."""
        return Measure(*norms("row_scatter_norms", self.rows_BT, self.values_BTD, self.summed_norms, None))

    def summed_norms(self, _grams: GramCache | None = None) -> Norms:
        """The same by PyTorch's operations."""
        values = wide(self.values_BTD)
        batch, length, width = values.shape
        # Numbering a sample's distinct rows keeps this linear in T, where a Gram matrix is not. All
        # have T places, needed or not: to ask how many are would wait for the device.
        rows_BT, order_BT = self.rows_BT.sort(dim=1)
        is_next_BT = torch.zeros_like(rows_BT)
        is_next_BT[:, 1:] = rows_BT[:, 1:] != rows_BT[:, :-1]
        places_BT = torch.empty_like(order_BT).scatter_(1, order_BT, is_next_BT.cumsum(1))
        places_BT += torch.arange(batch, device=values.device)[:, None] * length
        sums = values.new_zeros(batch * length, width)
        sums.index_add_(0, places_BT.flatten(), values.flatten(0, 1))
        spreads_B = torch.linalg.vector_norm(values, dim=2).sum(1)
        return squared_lengths(sums.view(batch, length, width)), spreads_B

    def select(self, keep_B: Tensor) -> RowScatter:
        """Returns the form with exact zeros for samples that are not kept."""
        return RowScatter(self.rows_BT, zero_dropped(self.values_BTD, keep_B), self.number_of_rows)

    def weighted_sum(self, factors_B: Tensor, total: Tensor | None) -> Tensor:
        """Returns ``total + Σ_b factors[b] · gradient[b]``, (V, D); writes into ``total`` if given."""
        values = wide(self.values_BTD)
        values = values * factors_B.to(values.dtype)[:, None, None]
        total = values.new_zeros(self.shape) if total is None else total
        return total.index_add_(0, self.rows_BT.flatten(), values.flatten(0, 1).to(total.dtype))


Form: TypeAlias = OuterProduct | RowScatter | Materialized | MaterializedInBlocks | SlottedOuterProduct


def samples_of(form: Form) -> set[int]:
    """How many samples each tensor of a form has: one number, B, where all is well."""
    if isinstance(form, MaterializedInBlocks):
        return {sum(len(block.gradients_BK) for block in form.blocks)}
    return {tensor.shape[0] if tensor.ndim else 0 for tensor in _tensors(form)}


def is_complex(form: Form) -> bool:
    """Whether a tensor of a form holds complex numbers."""
    return any(tensor.is_complex() for tensor in _tensors(form))


def _tensors(form: Form) -> Iterator[Tensor]:
    return (value for value in vars(form).values() if isinstance(value, Tensor))


def inner_products(first: Form, second: Form) -> Tensor:
    """Returns ⟨gradient of first, gradient of second⟩ per sample, (B,).

    Both forms must be of the same parameter and the same samples.
    """
    if isinstance(first, Materialized):
        first, second = second, first
    if isinstance(first, RowScatter) and isinstance(second, OuterProduct):
        first, second = second, first
    match first, second:
        case OuterProduct(), OuterProduct():
            products_BTS = product_of_positions(first.left_BTP, second.left_BTP)
            return products_BTS.mul_(product_of_positions(first.right_BTD, second.right_BTD)).sum((1, 2))
        case OuterProduct(), RowScatter():
            # Σ_{t,s} left[t, row of s] · ⟨right[t], value of s⟩
            rows_BTS = second.rows_BT[:, None, :].expand(-1, first.left_BTP.shape[1], -1)
            picked_BTS = wide(first.left_BTP.gather(2, rows_BTS))
            products_BTS = product_of_positions(first.right_BTD, second.values_BTD)
            return (picked_BTS * products_BTS).sum((1, 2))
        case OuterProduct(), Materialized():
            applied_BTD = product_of_positions(wide(first.left_BTP), wide(second.gradients_BK).mT)
            return (applied_BTD * wide(first.right_BTD)).sum((1, 2))
        case RowScatter(), RowScatter():
            same_BTS = first.rows_BT[:, :, None] == second.rows_BT[:, None, :]
            products_BTS = product_of_positions(first.values_BTD, second.values_BTD)
            return (products_BTS * same_BTS).sum((1, 2))
        case RowScatter(), Materialized():
            rows_BTD = first.rows_BT[:, :, None].expand(-1, -1, second.gradients_BK.shape[2])
            return (wide(second.gradients_BK.gather(1, rows_BTD)) * wide(first.values_BTD)).sum((1, 2))
        case _:
            return (first.dense() * second.dense()).reshape(first.dense().shape[0], -1).sum(1)


@dataclass(frozen=True, eq=False)
class SquaredNorms:
    """What is known of ‖Σ of all forms‖² of one parameter, per sample; of several together with an axis before B.

    Guarantee: a bound is at least the squared norm of what ``weighted_sum`` adds for a
    factor of one, rounding included. NaN stays NaN.

    Args:
        bounds_B: Not below the true squares, (B,).
        spreads_B: See ``Measure``.
        cancelled_B: Where the bound is mostly rounding, so that building the gradient gives a closer one.
    """

    bounds_B: Tensor
    spreads_B: Tensor
    cancelled_B: Tensor


def measure_uses(forms: Sequence[Form], grams: GramCache | None = None) -> Measure:
    """Returns ‖Σ of all forms‖² of one parameter per sample, up to cancellation, and the spread.

    A shared parameter's gradients add up before the norm, so every pair of uses
    contributes its cross term.

    Args:
        forms: The parameter's uses.
        grams: Gram matrices that may serve again.
    """
    measures = [form.measure(grams) for form in forms]
    if len(measures) == 1:
        return measures[0]
    total_B = functools.reduce(torch.add, (measure.squares_B for measure in measures))
    norms_U = [measure.squares_B.clamp(min=0).sqrt() for measure in measures]
    for (first, norm_B), (second, other_B) in itertools.combinations(zip(forms, norms_U, strict=True), 2):
        total_B = total_B + 2 * inner_products(first, second)
        if rounding := max(_rounding_of_cross_term(first), _rounding_of_cross_term(second)):
            total_B = total_B + 2 * rounding * (norm_B * other_B)
    # A stored gradient has one term, which the other uses' may cancel.
    spreads = (
        norm_B if m.spreads_B is None else m.spreads_B for m, norm_B in zip(measures, norms_U, strict=True)
    )
    return Measure(total_B, functools.reduce(torch.add, spreads))


def _rounding_of_cross_term(form: Form) -> float:
    """What products of this form with another lose, as a share of both norms."""
    match form:
        case OuterProduct():
            return rounding_of_products(form.left_BTP, form.right_BTD)
        case RowScatter():
            return rounding_of_products(form.values_BTD)
        case _:
            # Built: its products with other built ones are sums in the shape of a tree.
            return 0.0


def round_up(squares: Tensor, spreads: Tensor, rounding: float) -> SquaredNorms:
    """Returns bounds of squares that are known up to cancellation, of one parameter or several together.

    Args:
        squares: As in ``Measure``, (…, B).
        spreads: The same.
        rounding: ``rounding_of`` these parameters' uses.
    """
    unit = torch.finfo(squares.dtype).eps
    squared_spreads = spreads.square()
    bounds = squares.clamp(min=0) + rounding * unit * squared_spreads
    return SquaredNorms(bounds, spreads, squares < _TRUSTED * unit * squared_spreads)


def closer_bounds(forms: Sequence[Form], rough: SquaredNorms) -> Tensor:
    """Returns the bounds (B,) of ``rough``, from built gradients where terms cancelled."""
    unit = torch.finfo(rough.bounds_B.dtype).eps
    built_B = squared_lengths(sum_dense(forms)).sqrt()
    closer_B = (built_B + rounding_of(forms) * unit * rough.spreads_B).square()
    return torch.where(rough.cancelled_B, closer_B, rough.bounds_B)


def sum_squared_norms(forms: Sequence[Form], grams: GramCache | None = None) -> Tensor:
    """Returns bounds (B,) of one parameter's squared norms: ``round_up``, closer where needed."""
    measure = measure_uses(forms, grams)
    if measure.spreads_B is None:
        return measure.squares_B
    rough = round_up(measure.squares_B, measure.spreads_B, rounding_of(forms))
    return closer_bounds(forms, rough) if bool(rough.cancelled_B.any()) else rough.bounds_B


def rounding_of(forms: Sequence[Form]) -> float:
    """Rounding in units of the last place: of a sum of products, and of weights where they are split."""
    split = any(
        isinstance(form, OuterProduct) and splits_weights(form.left_BTP, form.right_BTD) for form in forms
    )
    # (norm + e · spread)² stays below norm² + 3 e · spread², as the norm stays below the spread.
    return _ROUNDING + 3 * ROUNDING_OF_WEIGHTS if split else _ROUNDING


def sum_dense(forms: Sequence[Form]) -> Tensor:
    """Returns the gradients of one parameter, all uses added up, (B, …)."""
    return functools.reduce(torch.add, (form.dense() for form in forms))
