"""Follows where the samples are, from one call on sample data to the next.

Tensors of sample data begin with a sample-major axis, as a rule. Mixtures of
experts break it: they pick the tokens of one expert, or sort all tokens by
expert. So picks and sorts along the first axis are followed, and what is made
row by row from their results belongs to the same samples. What cannot be
followed is marked, and an operation rule that needs its samples is refused.
Older models also work time first: a transpose moves the samples to another axis.

Axes: R row, B sample, T position within a sample, K any trailing axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dp_trainer.gradients.layouts import AxisLayout, Layout, RowLayout, sample_major

_PICKING = frozenset({Tensor.__getitem__, torch.index_select, Tensor.index_select})
_SORTING = frozenset({torch.sort, Tensor.sort, torch.argsort, Tensor.argsort})
_TRANSPOSING = frozenset(
    {
        *(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes, Tensor.t, torch.t),
        *(torch.swapdims, Tensor.swapdims, torch.moveaxis, Tensor.moveaxis),
        *(torch.permute, Tensor.permute, torch.movedim, Tensor.movedim, Tensor.T.__get__),  # type: ignore[attr-defined]
    }
)
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
# Made in the shape of a tensor, with none of its values.
_FRESH = frozenset(
    {
        *(
            torch.empty_like,
            torch.zeros_like,
            torch.ones_like,
            torch.full_like,
            torch.rand_like,
            torch.randn_like,
        ),
        *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
    }
)
_COUNTING = frozenset({torch.bincount, Tensor.bincount, torch.histc, Tensor.histc})
_JOINING = frozenset({torch.cat, torch.concat, torch.concatenate})
_RESHAPING = frozenset({Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten})
_SPLITTING = frozenset({torch.split, Tensor.split, torch.chunk, Tensor.chunk, torch.tensor_split})
# What can move samples that are still in their order.
_MOVING = _PICKING | _SORTING | _TRANSPOSING


class RowFollower:
    """Follows which sample each row belongs to, through the calls on sample data.

    Args:
        batch_size: B.
        known: The tensors free of sample data, by identity.
    """

    def __init__(self, batch_size: int, known: Mapping[int, object]) -> None:
        self._batch_size = batch_size
        self._known = known
        # None stands for rows that could not be followed. Weak: it must not keep activations alive.
        self._layouts: Any = WeakTensorKeyDictionary()

    def layout(self, arguments: Any) -> tuple[bool, Layout | None]:
        """Returns whether the rows can be told, and their layout: None where they are sample-major."""
        if not self._layouts:
            return True, None
        tensors = [t for t in _tensors(arguments) if id(t) not in self._known]
        layouts = [self._layouts[t] for t in tensors if t in self._layouts]
        if not layouts:
            return True, None
        first = layouts[0]
        if isinstance(first, RowLayout):
            axes = {t.ndim for t in tensors if t in self._layouts}
            if any(t.ndim in axes and self._contradicts(t, first) for t in tensors):
                return False, None
        for other in layouts[1:]:
            if first is None or not first.agrees(other):
                return False, None
        return first is not None, first

    def _contradicts(self, tensor: Tensor, layout: RowLayout) -> bool:
        """Whether sample data in the ordinary order meets reordered rows, place by place."""
        alike = tensor.is_floating_point() and layout.fits(tensor.shape)
        return alike and tensor not in self._layouts and not layout.is_sample_major()

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Notes the rows of a call's results."""
        if func in _MOVING and self._note_moved(func, args, kwargs, result):
            return
        if self._layouts:
            self._pass_on(func, args, kwargs, result)

    def _note_moved(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Notes a pick, a sort or a transpose of sample data; returns whether it was followed."""
        source = _first_argument(args, kwargs)
        # Rows of a table of constants or parameters are no samples'.
        if id(source) in self._known:
            return False
        if func in _TRANSPOSING:
            return self._note_transpose(source, result)
        if func in _PICKING:
            return self._note_pick(func, source, args[1:], kwargs, result)
        if source.ndim != 1:
            return False
        self._note_sort(source, result)
        return True

    def _pass_on(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Gives a call's results the rows of its arguments."""
        if func in _WRITING:
            if func is Tensor.__setitem__:
                self._note_put(*args)
            elif func is Tensor.copy_:
                self._copy_layout(args[1], args[0])
            else:
                self._copy_layout(_first_argument(args, kwargs), result)
            return
        if func in _FRESH:
            return
        if func in _COUNTING:
            # One place for each value, not for each sample.
            for output in _tensors((result,)):
                self._layouts[output] = None
            return
        if func is torch.einsum and self._note_einsum(args, result):
            return
        if func in _JOINING and self._note_join(args, kwargs, result):
            return
        known, layout = self.layout((*args, *kwargs.values()))
        if known and layout is None:
            return
        outputs = list(_tensors((result,)))
        if isinstance(layout, AxisLayout) and func in _RESHAPING:
            layout = layout.reshaped(result.shape) or layout
        if layout is not None and func in _SPLITTING and self._note_split(layout, outputs):
            return
        for output in outputs:
            self._note(output, layout)

    def _note(self, output: Tensor, layout: Layout | None) -> None:
        """Gives an output its rows' samples; one whose rows differ in number is marked."""
        if isinstance(layout, AxisLayout):
            if layout.fits(output.shape):
                self._layouts[output] = layout
        elif layout is not None and _has_rows(output, len(layout)):
            self._layouts[output] = layout
        elif output.is_floating_point() and output.ndim and (layout is None or not layout.is_sample_major()):
            self._layouts[output] = None

    def _note_pick(self, func: Any, source: Tensor, indices: Any, kwargs: Any, result: Any) -> bool:
        """Notes ``source[index]`` where the index picks rows; returns whether it does."""
        if func is Tensor.__getitem__:
            keys = indices[0]
            key = keys[0] if isinstance(keys, tuple) and keys else keys
            if key is None and isinstance(keys, tuple) and len(keys) > 1:
                key = keys[1]
            rows = self._layouts.get(source) if self._layouts else None
            if isinstance(key, slice) and isinstance(rows, RowLayout):
                self._layouts[result] = RowLayout(rows.samples_R[key], self._batch_size)
                return True
        else:
            dim = indices[0] if indices else kwargs.get("dim", kwargs.get("axis"))
            key = indices[1] if len(indices) > 1 else kwargs["index"]
            if dim % max(1, source.ndim):
                return False
        if not isinstance(key, Tensor) or not key.ndim or not source.ndim:
            return False
        if isinstance(self._layouts.get(source), AxisLayout):
            return self._note_pick_by_axes(source, indices[0], result)
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

    def _note_pick_by_axes(self, source: Tensor, keys: Any, result: Tensor) -> bool:
        """Notes a pick by one index tensor for each leading axis: the samples' own tells the rows."""
        layout = self._layouts[source]
        keys = keys if isinstance(keys, tuple) else (keys,)
        if len(keys) <= layout.axis or not all(isinstance(k, Tensor) and k.ndim == 1 for k in keys):
            return False
        rows = layout.lead[layout.axis]
        samples_R = sample_major(rows, self._batch_size, source.device)[keys[layout.axis]]
        self._layouts[result] = RowLayout(samples_R, self._batch_size)
        return True

    def _keeps(self, layout: Layout | None, keys: Any, written: Layout | None) -> bool:
        """Whether each row is written to a place of its own sample."""
        if (
            not isinstance(written, RowLayout)
            or not isinstance(layout, AxisLayout)
            or len(keys) <= layout.axis
        ):
            return False
        rows, key = layout.lead[layout.axis], keys[layout.axis]
        return torch.equal(sample_major(rows, self._batch_size, key.device)[key], written.samples_R)

    def _copy_layout(self, source: object, target: object) -> None:
        """What is made row by row of the source has its samples."""
        if not isinstance(target, Tensor):
            return
        if isinstance(source, Tensor) and source in self._layouts:
            layout = self._layouts[source]
            self._layouts[target] = layout if layout is None or layout.fits(target.shape) else None
        else:
            self._layouts.pop(target, None)

    def _note_put(self, target: Tensor, keys: Any, value: Any) -> None:
        """Notes where the samples are in a tensor that rows are written into, by one index for each axis."""
        layout = self._layouts.get(value) if isinstance(value, Tensor) else None
        keys = keys if isinstance(keys, tuple) else (keys,)
        indexed = all(isinstance(k, Tensor) and k.ndim == 1 for k in keys)
        if target in self._layouts and isinstance(value, Tensor) and indexed:
            if not self._keeps(self._layouts[target], keys, layout):
                # Some of its rows may be another sample's from here on.
                self._layouts[target] = None
            return
        if not indexed or not isinstance(layout, RowLayout):
            return
        places = []
        for axis, key in enumerate(keys):
            rows = target.shape[axis]
            if rows and not rows % self._batch_size:
                samples_R = sample_major(rows, self._batch_size, key.device)[key]
                places += [axis] if torch.equal(samples_R, layout.samples_R) else []
        if 0 not in places:
            known = len(places) == 1
            self._layouts[target] = (
                AxisLayout(target.shape[: places[0] + 1], self._batch_size) if known else None
            )

    def _note_transpose(self, source: Tensor, result: Tensor) -> bool:
        """Notes where a permutation of axes moves the samples' axis; returns whether it was followed."""
        axis = 0
        if self._layouts and source in self._layouts:
            layout = self._layouts[source]
            if isinstance(layout, RowLayout):
                self._layouts[result] = layout if _keeps_first_axis(source, result, len(layout)) else None
                return True
            if layout is None:
                return False
            axis = layout.axis
        shape = source.shape
        if len(shape) <= axis or not shape[axis] or shape[axis] % self._batch_size:
            return False
        # Strides tell axes of the same length apart.
        moved = (shape[axis], source.stride(axis))
        axes = list(zip(result.shape, result.stride(), strict=True))
        if len(axes) != len(shape) or axes.count(moved) != 1:
            return False
        place = axes.index(moved)
        if place > 0:
            self._layouts[result] = AxisLayout(result.shape[: place + 1], self._batch_size)
        return True

    def _note_einsum(self, args: Any, result: Tensor) -> bool:
        """Notes the axis of the samples' letter in the result; returns whether it was followed."""
        operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        inputs, arrow, output = args[0].replace(" ", "").partition("->")
        letters = set()
        for term, operand in zip(inputs.split(","), operands, strict=True):
            layout = self._layouts.get(operand)
            if isinstance(layout, AxisLayout):
                letters.add(term[layout.axis])
        if not arrow or "." in args[0] or len(letters) != 1:
            return False
        place = output.find(letters.pop())
        if place > 0:
            self._layouts[result] = AxisLayout(result.shape[: place + 1], self._batch_size)
        return bool(place >= 0)

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
        if not result.ndim or dim % result.ndim or not all(isinstance(t, RowLayout) for t in layouts):
            return False
        samples_R = torch.cat([layout.samples_R for layout in layouts])
        self._layouts[result] = RowLayout(samples_R, self._batch_size)
        return True

    def _note_split(self, layout: Layout, outputs: list[Tensor]) -> bool:
        """Notes the pieces of a split along the rows; returns whether it was one."""
        if not isinstance(layout, RowLayout):
            return False
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
            return layout.samples_R if isinstance(layout, RowLayout) else None
        rows = source.shape[0]
        if not rows or rows % self._batch_size:
            return None
        return sample_major(rows, self._batch_size, source.device)


def _has_rows(tensor: Tensor, rows: int) -> bool:
    """Whether the tensor's first axis, or its second behind a single one, holds the rows."""
    if tensor.ndim == 0:
        return False
    return tensor.shape[0] == rows or (tensor.ndim > 1 and tensor.shape[0] == 1 and tensor.shape[1] == rows)


def _keeps_first_axis(source: Tensor, result: Tensor, rows: int) -> bool:
    """Whether a permutation of axes left the rows, on the first axis, where they are."""
    axes = list(zip(source.shape, source.stride(), strict=True))
    here = (result.shape[0], result.stride(0)) == axes[0]
    return source.shape[0] == rows and here and axes.count(axes[0]) == 1


def _first_argument(args: Any, kwargs: Any) -> Any:
    """A torch function's first argument, by place or by any name that torch takes for it."""
    return args[0] if args else next(kwargs[name] for name in ("input", "x", "a", "x1") if name in kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
