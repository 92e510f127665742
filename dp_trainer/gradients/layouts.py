"""Where the samples are in a tensor, if not along its first axis in their order.

Axes: R row, B sample, T position within a sample, K any trailing axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor


class RowLayout:
    """The samples of a tensor's rows.

    Args:
        samples_R: The sample of each row, (R,), integers in [0, batch_size).
        batch_size: B.
    """

    def __init__(self, samples_R: Tensor, batch_size: int) -> None:
        self.samples_R = samples_R
        self._batch_size = batch_size
        self._cached_places: tuple[Tensor, int] | None = None

    def __len__(self) -> int:
        return len(self.samples_R)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape runs over the rows along its first axis."""
        return len(shape) > 0 and shape[0] == len(self)

    def agrees(self, other: Layout | None) -> bool:
        """Whether both say the same of every row."""
        return isinstance(other, RowLayout) and torch.equal(self.samples_R, other.samples_R)

    def by_sample(self, tensor_RK: Tensor) -> Tensor:
        """Returns the rows as (B, T, …): each sample's own in their order, then zeros up to the longest."""
        places_R, longest = self._places()
        laid_out = tensor_RK.new_zeros(self._batch_size * longest, *tensor_RK.shape[1:])
        laid_out.index_copy_(0, places_R, tensor_RK)
        return laid_out.view(self._batch_size, longest, *tensor_RK.shape[1:])

    def sum_by_sample(self, tensor_RK: Tensor) -> Tensor:
        """Returns the sum of each sample's rows, (B, …)."""
        sums = tensor_RK.new_zeros(self._batch_size, *tensor_RK.shape[1:])
        return sums.index_add_(0, self.samples_R, tensor_RK)

    def is_sample_major(self) -> bool:
        """Whether the rows stand in the order of the samples, equally many of each."""
        share, rest = divmod(len(self), self._batch_size)
        expected = sample_major(len(self), self._batch_size, self.samples_R.device)
        return share > 0 and not rest and torch.equal(self.samples_R, expected)

    def _places(self) -> tuple[Tensor, int]:
        """Where each row goes in the flattened (B, T) layout, and T."""
        if self._cached_places is None:
            counts_B = torch.bincount(self.samples_R, minlength=self._batch_size)
            longest = max(1, int(counts_B.max()))
            order_R = torch.argsort(self.samples_R, stable=True)
            firsts_B = counts_B.cumsum(0) - counts_B
            ranks_R = torch.empty_like(order_R)
            ranks_R[order_R] = torch.arange(len(self), device=order_R.device)
            ranks_R = ranks_R - firsts_B[self.samples_R]
            self._cached_places = self.samples_R * longest + ranks_R, longest
        return self._cached_places


class AxisLayout:
    """Samples along an axis that is not the first.

    Args:
        lead: The tensor's leading axes, up to and with the samples' own.
        batch_size: B. The samples' axis is sample-major.
    """

    def __init__(self, lead: Sequence[int], batch_size: int) -> None:
        self.lead = tuple(lead)
        self._batch_size = batch_size

    @property
    def axis(self) -> int:
        """The samples' axis."""
        return len(self.lead) - 1

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape has as many rows on the samples' axis."""
        return len(shape) > self.axis and shape[self.axis] == self.lead[self.axis]

    def agrees(self, other: Layout | None) -> bool:
        """Whether both name the same axis, with as many rows."""
        return isinstance(other, AxisLayout) and self.axis == other.axis and other.fits(self.lead)

    def reshaped(self, shape: Sequence[int]) -> AxisLayout | None:
        """Returns the layout after the samples' axis was split or merged with the next one, if that is what happened."""
        rows, place = self.lead[self.axis], self.axis
        if len(shape) <= place or tuple(shape[:place]) != self.lead[:place] or not shape[place]:
            return None
        divides = shape[place] % rows == 0 or rows % shape[place] == 0
        if not divides or shape[place] % self._batch_size:
            return None
        return AxisLayout(shape[: place + 1], self._batch_size)

    def by_sample(self, tensor: Tensor) -> Tensor:
        """Returns the tensor as (B, T, …), all leading axes in T."""
        rows_first = tensor.movedim(self.axis, 0)
        positions = math.prod(tensor.shape[: len(self.lead)]) // self._batch_size
        return rows_first.reshape(self._batch_size, positions, *tensor.shape[len(self.lead) :])

    def sum_by_sample(self, tensor: Tensor) -> Tensor:
        """Returns the sum over all leading axes for each sample, (B, …)."""
        return self.by_sample(tensor).sum(1)


Layout: TypeAlias = RowLayout | AxisLayout


def describe_rows(rows: tuple[bool, Layout | None]) -> str:
    """Says in words where the samples are: whether it is known, and the layout."""
    known, layout = rows
    if not known:
        return "unknown"
    if layout is None:
        return "first axis"
    return "rows" if isinstance(layout, RowLayout) else f"axis {layout.axis}"


def sample_major(rows: int, batch_size: int, device: torch.device) -> Tensor:
    """Returns the samples of rows in their ordinary order, (R,)."""
    return torch.arange(rows, device=device) // max(1, rows // batch_size)
