"""The form of a stack of weights, each position using one of them: experts.

Axes: B sample, T and S position, E slot of the stack, P first weight axis, D
second weight axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_trainer.gradients.measures import (
    GramCache,
    Measure,
    product_of_positions,
    rounding_of_products,
    wide,
    zero_dropped,
)


@dataclass(frozen=True, eq=False)
class SlottedOuterProduct:
    """Sample b's gradient adds ``left[b, t] ⊗ right[b, t]`` to slot ``slots[b, t]`` of a stack (E, P, D).

    Args:
        left_BTP: Factors along the parameter's second axis.
        right_BTD: Factors along its last axis.
        slots_BT: Slot numbers, integers in [0, number_of_slots). Where a factor is zero, any number does.
        number_of_slots: E, the stack's height.
    """

    left_BTP: Tensor
    right_BTD: Tensor
    slots_BT: Tensor
    number_of_slots: int

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape, (E, P, D)."""
        return torch.Size((self.number_of_slots, self.left_BTP.shape[2], self.right_BTD.shape[2]))

    def dense(self) -> Tensor:
        """Returns the gradients themselves, (B, E, P, D)."""
        left, right = wide(self.left_BTP), wide(self.right_BTD)
        batch, _, height = left.shape
        gradients = left.new_zeros(batch, self.number_of_slots, height, right.shape[2])
        for slot in self._used_slots():
            masked = left * (self.slots_BT == slot)[:, :, None]
            gradients[:, slot] = torch.bmm(masked.mT, right)
        return gradients

    def measure(self, _grams: GramCache | None = None) -> Measure:
        """Returns ‖gradient‖² up to cancellation, and the spread: positions meet where their slots agree."""
        left, right = wide(self.left_BTP), wide(self.right_BTD)
        products_BTS = product_of_positions(left, left).mul_(product_of_positions(right, right))
        spreads_B = products_BTS.diagonal(dim1=1, dim2=2).sqrt().sum(1)
        apart_BTS = self.slots_BT[:, :, None] != self.slots_BT[:, None, :]
        squares_B = products_BTS.masked_fill_(apart_BTS, 0).sum((1, 2))
        return Measure(squares_B * (1 + rounding_of_products(left, right)), spreads_B)

    def select(self, keep_B: Tensor) -> SlottedOuterProduct:
        """Returns the form with exact zeros for samples that are not kept."""
        left, right = zero_dropped(self.left_BTP, keep_B), zero_dropped(self.right_BTD, keep_B)
        return SlottedOuterProduct(left, right, self.slots_BT, self.number_of_slots)

    def transposed(self) -> SlottedOuterProduct:
        """Returns the form of the stack with each weight transposed, (E, D, P)."""
        return SlottedOuterProduct(self.right_BTD, self.left_BTP, self.slots_BT, self.number_of_slots)

    def weighted_sum(self, factors_B: Tensor, total: Tensor | None) -> Tensor:
        """Returns ``total + Σ_b factors[b] · gradient[b]``, (E, P, D); writes into ``total`` if given."""
        left, right = wide(self.left_BTP), wide(self.right_BTD)
        weighted_XP = (left * factors_B.to(left.dtype)[:, None, None]).flatten(0, 1)
        right_XD, slots_X = right.flatten(0, 1), self.slots_BT.flatten()
        total = left.new_zeros(self.shape) if total is None else total
        for slot in self._used_slots():
            rows = (slots_X == slot).nonzero()[:, 0]
            total[slot].addmm_(weighted_XP[rows].T, right_XD[rows])
        return total

    def _used_slots(self) -> Iterator[int]:
        yield from torch.unique(self.slots_BT).tolist()


def join(forms: Sequence[SlottedOuterProduct]) -> SlottedOuterProduct:
    """Returns one form for several uses of the same stack: their positions stand side by side."""
    if len(forms) == 1:
        return forms[0]
    dtypes = [tensor.dtype for form in forms for tensor in (form.left_BTP, form.right_BTD)]
    dtype = (
        dtypes[0] if len(set(dtypes)) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32
    )
    return SlottedOuterProduct(
        torch.cat([form.left_BTP.to(dtype) for form in forms], 1),
        torch.cat([form.right_BTD.to(dtype) for form in forms], 1),
        torch.cat([form.slots_BT for form in forms], 1),
        forms[0].number_of_slots,
    )
