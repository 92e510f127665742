"""Which sample each row of a tensor belongs to, where a model reorders rows.

Tensors of sample data begin with a sample-major axis, as a rule. Mixtures of
experts break it: they pick the tokens of one expert, or sort all tokens by
expert. So picks and sorts along the first axis are followed, and what is made
row by row from their results belongs to the same samples. What cannot be
followed is marked, and an operation rule that needs its samples is refused.

Axes: R row, B sample, T position within a sample, K any trailing axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_PICKING = frozenset({Tensor.__getitem__, torch.index_select, Tensor.index_select})
_SORTING = frozenset({torch.sort, Tensor.sort, torch.argsort, Tensor.argsort})
# The result has the rows of what is written into, whatever is written.
_WRITING = frozenset(
    {
        *(torch.index_add, Tensor.index_add, Tensor.index_add_, Tensor.index_copy_, Tensor.index_put_),
        *(torch.index_put, Tensor.index_put, torch.index_copy, Tensor.index_copy, Tensor.masked_scatter),
        *(torch.scatter, Tensor.scatter, Tensor.scatter_, torch.scatter_add, Tensor.scatter_add),
        *(Tensor.scatter_add_, Tensor.scatter_reduce, Tensor.scatter_reduce_, Tensor.__setitem__),
        *(torch.masked_scatter, Tensor.masked_scatter_, Tensor.copy_),
    }
)
_JOINING = frozenset({torch.cat, torch.concat, torch.concatenate})
_SPLITTING = frozenset({torch.split, Tensor.split, torch.chunk, Tensor.chunk, torch.tensor_split})


class RowLayout:
    """The samples of a tensor's rows.

    Args:
        samples_R: The sample of each row, (R,), integers in [0, batch_size).
        batch_size: B.
    """

    def __init__(self, samples_R: Tensor, batch_size: int) -> None:
        self.samples_R = samples_R
        self._batch_size = batch_size
        self._slots: tuple[Tensor, int] | None = None

    def __len__(self) -> int:
        return len(self.samples_R)

    def by_sample(self, tensor_RK: Tensor) -> Tensor:
        """Returns the rows as (B, T, …): each sample's own in their order, then zeros up to the longest."""
        slots_R, longest = self._places()
        laid_out = tensor_RK.new_zeros(self._batch_size * longest, *tensor_RK.shape[1:])
        laid_out.index_copy_(0, slots_R, tensor_RK)
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
        if self._slots is None:
            counts_B = torch.bincount(self.samples_R, minlength=self._batch_size)
            longest = max(1, int(counts_B.max()))
            order_R = torch.argsort(self.samples_R, stable=True)
            firsts_B = counts_B.cumsum(0) - counts_B
            ranks_R = torch.empty_like(order_R)
            ranks_R[order_R] = torch.arange(len(self), device=order_R.device)
            ranks_R = ranks_R - firsts_B[self.samples_R]
            self._slots = self.samples_R * longest + ranks_R, longest
        return self._slots


def sample_major(rows: int, batch_size: int, device: torch.device) -> Tensor:
    """Returns the samples of rows in their ordinary order, (R,)."""
    return torch.arange(rows, device=device) // max(1, rows // batch_size)


class RowFollower:
    """Follows which sample each row belongs to, through the calls on sample data.

    Args:
        batch_size: B.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        # None stands for rows that could not be followed. Weak: it must not keep activations alive.
        self._layouts: Any = WeakTensorKeyDictionary()

    def layout(self, arguments: Any) -> tuple[bool, RowLayout | None]:
        """Returns whether the rows can be told, and their layout: None where they are sample-major."""
        layouts = [self._layouts[t] for t in _tensors(arguments) if t in self._layouts]
        if not layouts:
            return True, None
        first = layouts[0]
        for other in layouts[1:]:
            if first is None or other is None or not torch.equal(first.samples_R, other.samples_R):
                return False, None
        return first is not None, first

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any, *, of_data: bool) -> None:
        """Notes the rows of a call's results; ``of_data``: whether its first argument is sample data."""
        if of_data and func in _PICKING and self._note_pick(func, args, kwargs, result):
            return
        if of_data and func in _SORTING and args[0].ndim == 1:
            self._note_sort(args[0], result)
            return
        if not self._layouts or func in _WRITING:
            return
        if func in _JOINING and self._note_join(args, kwargs, result):
            return
        known, layout = self.layout((args, kwargs.values()))
        if known and layout is None:
            return
        outputs = list(_tensors((result,)))
        if layout is not None and func in _SPLITTING and self._note_split(layout, outputs):
            return
        for output in outputs:
            self._note(output, layout)

    def _note(self, output: Tensor, layout: RowLayout | None) -> None:
        """Gives an output its rows' samples; one whose rows differ in number is marked."""
        if layout is not None and _has_rows(output, len(layout)):
            self._layouts[output] = layout
        elif output.is_floating_point() and output.ndim and (layout is None or not layout.is_sample_major()):
            self._layouts[output] = None

    def _note_pick(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Notes ``source[index]`` where the index picks rows; returns whether it does."""
        source = args[0]
        if func is Tensor.__getitem__:
            key = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            if key is None and isinstance(args[1], tuple) and len(args[1]) > 1:
                key = args[1][1]
            if isinstance(key, slice) and source in self._layouts and self._layouts[source] is not None:
                samples_R = self._layouts[source].samples_R[key]
                self._layouts[result] = RowLayout(samples_R, self._batch_size)
                return True
        else:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            key = args[2] if len(args) > 2 else kwargs.get("index")
            if dim is None or dim % max(1, source.ndim):
                return False
        if not isinstance(key, Tensor) or not key.ndim or not source.ndim:
            return False
        samples_R = self._samples(source)
        if samples_R is None:
            if source in self._layouts:
                self._layouts[result] = None
            return source in self._layouts
        if key.dtype in (torch.bool, torch.uint8):
            index_N = key.nonzero()[:, 0]
        elif key.ndim == 1:
            index_N = key
        else:
            return False
        with torch.no_grad():
            self._layouts[result] = RowLayout(samples_R[index_N.detach()], self._batch_size)
        return True

    def _note_sort(self, source: Tensor, result: Any) -> None:
        """Notes a sort of one axis: values and indices belong to the samples that they came from."""
        samples_R = self._samples(source)
        indices = result if isinstance(result, Tensor) else result[1]
        layout = None if samples_R is None else RowLayout(samples_R[indices], self._batch_size)
        if layout is None and source not in self._layouts:
            return
        for output in _tensors((result,)):
            self._layouts[output] = layout

    def _note_join(self, args: Any, kwargs: Any, result: Tensor) -> bool:
        """Notes tensors joined along their rows, each with a layout of its own; returns whether they are."""
        tensors = args[0] if args else kwargs["tensors"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        layouts = [self._layouts.get(tensor) for tensor in tensors]
        if not result.ndim or dim % result.ndim or any(layout is None for layout in layouts):
            return False
        samples_R = torch.cat([layout.samples_R for layout in layouts])
        self._layouts[result] = RowLayout(samples_R, self._batch_size)
        return True

    def _note_split(self, layout: RowLayout, outputs: list[Tensor]) -> bool:
        """Notes the pieces of a split along the rows; returns whether it was one."""
        lengths = [output.shape[0] if output.ndim else 0 for output in outputs]
        if all(length == len(layout) for length in lengths) or sum(lengths) != len(layout):
            return False
        for output, samples_R in zip(outputs, torch.split(layout.samples_R, lengths), strict=True):
            self._layouts[output] = RowLayout(samples_R, self._batch_size)
        return True

    def _samples(self, source: Tensor) -> Tensor | None:
        """The samples of the rows of ``source``; None where they cannot be told."""
        if source in self._layouts:
            layout = self._layouts[source]
            return None if layout is None else layout.samples_R
        rows = source.shape[0]
        if not rows or rows % self._batch_size:
            return None
        return sample_major(rows, self._batch_size, source.device)


def _has_rows(tensor: Tensor, rows: int) -> bool:
    """Whether the tensor's first axis, or its second behind a single one, holds the rows."""
    if tensor.ndim == 0:
        return False
    return tensor.shape[0] == rows or (tensor.ndim > 1 and tensor.shape[0] == 1 and tensor.shape[1] == rows)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
