"""One intercepted call, as its operation rule sees it.

Axes: B sample, R row of the first axis, T position, K any trailing axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.overrides import resolve_name

from dp_trainer.errors import UnsupportedOperationError
from dp_trainer.gradients.derived import Derived
from dp_trainer.gradients.forms import Form
from dp_trainer.gradients.layouts import AxisLayout, Layout, RowLayout, sample_major
from dp_trainer.gradients.rules.base import FormMaker
from dp_trainer.gradients.stored import Materialized


class Recorder(Protocol):
    """Where a call's records go. ``capture`` implements it."""

    batch_size: int

    def record(self, derived: Derived, form: Form, *, aligned: bool = False) -> None:
        """Adds one use of a parameter or of a tensor derived from some."""

    def expect(self, derived: Derived) -> None:
        """Announces a use whose gradient the backward pass will record."""

    def derive(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Runs a function of parameters and constants; its result stays tracked."""

    def anchored(self, output: Tensor) -> Tensor:
        """Gives an output that needs no gradient a place in the graph, so that its gradient arrives."""


class CapturedCall:
    """Implements ``rules.base.Call`` for one call.

    Args:
        recorder: The capture.
        function: The torch function.
        known: What is tracked, by identity.
        rooted: The tracked arguments.
        rows: Whether the samples of the data's rows can be told, and their
            layout: None where the rows are sample-major.
    """

    def __init__(
        self,
        recorder: Recorder,
        function: Callable[..., Any],
        known: Mapping[int, Derived],
        rooted: Sequence[Derived],
        rows: tuple[bool, Layout | None],
    ) -> None:
        self.batch_size = recorder.batch_size
        self._recorder = recorder
        self._function = function
        self._known = known
        self._rooted = rooted
        self._rows_known, self._layout = rows

    def is_tracked(self, value: object) -> bool:
        """Whether the value is a trainable parameter or derived from one."""
        entry = self._known.get(id(value))
        return entry is not None and bool(entry.roots)

    @property
    def sample_axis(self) -> int:
        """The axis of the data that runs over the samples."""
        if not self._rows_known or isinstance(self._layout, RowLayout):
            self.refuse("its data's rows were picked or reordered")
        return self._layout.axis if self._layout is not None else 0

    def repeats_batch(self, tensor: Tensor) -> bool:
        """Whether the forward pass gave a tracked tensor a first axis that may run over the samples."""
        return self._known[id(tensor)].batch_first

    def is_data(self, value: object) -> bool:
        """Whether the value is a tensor that may hold sample data."""
        if not isinstance(value, Tensor):
            return False
        entry = self._known.get(id(value))
        # A constant that needs a gradient was written to with sample data.
        return entry is None or (not entry.roots and value.requires_grad)

    def value(self, argument: Any) -> Any:
        """The argument without its autograd link to parameters; anything else unchanged."""
        return argument.detach() if self.is_tracked(argument) else argument

    def watch(self, output: Tensor, *uses: tuple[Tensor | None, FormMaker]) -> Tensor:
        """Records each use's form when the gradient of ``output`` arrives; returns the output."""
        tracked = [(self._known[id(t)], maker) for t, maker in uses if self.is_tracked(t)]
        for derived, _ in tracked:
            self._recorder.expect(derived)
        if output._is_view():
            # A view written to in place loses its hooks. This shares the memory and is no view.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        if not output.requires_grad:
            output = self._recorder.anchored(output)
        self._record_once(output, tracked)
        return output

    def by_sample(self, tensor: Tensor) -> Tensor:
        """The detached tensor as (B, T, last axis); its first axis must run over the data's rows."""
        if self._row_layout(tensor) is not None:
            laid_out = self._layout.by_sample(tensor.detach())  # type: ignore[union-attr]
            return laid_out.reshape(self.batch_size, -1, tensor.shape[-1])
        shape = tensor.shape
        if len(shape) == 3 and shape[0] == self.batch_size:
            return tensor.detach()
        rows = shape[0] if len(shape) > 1 else -1
        if rows < 0 or rows % self.batch_size:
            self.refuse(f"a tensor of shape {tuple(shape)} has no sample axis of {self.batch_size}")
        positions = tensor.numel() // max(1, self.batch_size * shape[-1])
        return tensor.detach().reshape(self.batch_size, positions, shape[-1])

    def sum_by_sample(self, tensor: Tensor) -> Tensor:
        """The detached tensor's rows added up for each sample, (B, …)."""
        layout = self._row_layout(tensor)
        if layout is not None:
            return layout.sum_by_sample(tensor.detach())
        if not tensor.ndim or tensor.shape[0] % self.batch_size:
            self.refuse(f"a tensor of shape {tuple(tensor.shape)} has no sample axis of {self.batch_size}")
        return self._split(tensor.detach()).sum(1)

    def samples(self, tensor: Tensor) -> list[Tensor]:
        """The tensor's own rows of each sample, B tensors, with their autograd links."""
        if self._row_layout(tensor) is not None:
            self.refuse("its rows were picked or sorted, and it takes samples in their order only")
        if not tensor.ndim or not tensor.shape[0] or tensor.shape[0] % self.batch_size:
            self.refuse(f"a tensor of shape {tuple(tensor.shape)} has no sample axis of {self.batch_size}")
        return list(tensor.chunk(self.batch_size))

    def copies(self, tensor: Tensor) -> list[Tensor]:
        """One copy of a tracked tensor for each sample; what arrives at copy b is sample b's gradient."""
        derived = self._known[id(tensor)]
        if derived.batch_first and tensor.ndim and tensor.shape[0] == self.batch_size > 1:
            self.refuse("its argument made from parameters has a first axis that may run over the samples")
        stacked = tensor.detach().expand(self.batch_size, *tensor.shape).requires_grad_()
        self._recorder.expect(derived)
        self._record_once(stacked, [(derived, Materialized)])
        return list(stacked.unbind())

    def own_places(self, tensor: Tensor, axis: int) -> Tensor:
        """A tracked tensor with an axis over the samples; what arrives there is each sample's gradient.

        Only for operations that pair place r of the axis with row r of the data.
        """
        derived, rows = self._known[id(tensor)], tensor.shape[axis]
        if rows % self.batch_size:
            self.refuse(f"a tensor of shape {tuple(tensor.shape)} has no axis over the samples")
        copy = tensor.detach().requires_grad_()
        self._recorder.expect(derived)

        def taken_apart(grad: Tensor) -> Materialized:
            samples_R = sample_major(rows, self.batch_size, grad.device)
            own_BR = samples_R == torch.arange(self.batch_size, device=grad.device)[:, None]
            apart = grad.movedim(axis, 0) * own_BR.view(*own_BR.shape, *[1] * (grad.ndim - 1))
            return Materialized(apart.movedim(1, axis + 1))

        self._record_once(copy, [(derived, taken_apart)])
        return copy

    def per_sample_copy(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A tracked tensor expanded over the samples, ready to broadcast to ``shape``."""
        derived, axes, layout = self._known[id(tensor)], len(shape), self._layout
        axis = layout.axis if isinstance(layout, AxisLayout) else 0
        rows = shape[axis] if axes > axis else 0
        padded = (*[1] * (axes - tensor.ndim), *tensor.shape)
        aligned = derived.batch_first and tensor.ndim == axes and layout is None and padded[0] == rows != 1
        spreadable = tensor.ndim <= axes and axes > axis and padded[axis] == 1
        placed = layout.fits(shape) if layout is not None else not rows % self.batch_size
        if not self._rows_known or not rows or not placed or not (aligned or spreadable):
            self.refuse(
                f"parameters of shape {tuple(tensor.shape)} meet data of shape {tuple(shape)}, "
                f"whose axis {axis} does not run over the {self.batch_size} samples"
            )
        if aligned:
            copy = tensor.detach()
        else:
            copy = tensor.detach().reshape(padded).expand(*padded[:axis], rows, *padded[axis + 1 :])

        def added_up(grad: Tensor) -> Materialized:
            if aligned:
                return Materialized(self._split(grad))
            if isinstance(layout, RowLayout):
                summed = layout.sum_by_sample(grad)
            else:
                summed = self._split(grad.movedim(axis, 0)).sum(1)
            return Materialized(summed.reshape(self.batch_size, *tensor.shape))

        if not copy.is_floating_point():
            self.refuse(f"its argument is of type {copy.dtype}")
        self._recorder.expect(derived)
        self._record_once(copy.requires_grad_(), [(derived, added_up)], aligned=aligned)
        return copy

    def derive(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function of parameters and constants; its result stays tracked."""
        return self._recorder.derive(function, args)

    def refuse(self, reason: str) -> NoReturn:
        """Raises ``UnsupportedOperationError`` for this call."""
        raise refusal(self._function, self._rooted, reason)

    def _record_once(
        self, tensor: Tensor, uses: Sequence[tuple[Derived, FormMaker]], *, aligned: bool = False
    ) -> None:
        """Records the uses when the tensor's gradient arrives, and refuses a second one.

        What a maker needs is freed then: the graph keeps its hooks until all of it is gone.
        """
        waiting, has_arrived = list(uses), False

        def record(grad: Tensor) -> None:
            nonlocal has_arrived
            if has_arrived:
                self.refuse("its gradient arrived twice, in two backward passes of one forward pass")
            # First of all: a pass that fails half-way must not be taken up again.
            has_arrived = True
            with torch._C.DisableTorchFunction():
                while waiting:
                    derived, maker = waiting.pop(0)
                    self._recorder.record(derived, maker(grad.detach()), aligned=aligned)

        if waiting:
            tensor.register_hook(record)  # type: ignore[no-untyped-call]

    def _split(self, tensor: Tensor) -> Tensor:
        """A tensor with sample-major rows as (B, rows of a sample, …)."""
        return tensor.reshape(self.batch_size, tensor.shape[0] // self.batch_size, *tensor.shape[1:])

    def _row_layout(self, tensor: Tensor) -> Layout | None:
        """The layout of a tensor that runs over this call's rows; None where they are sample-major."""
        if not self._rows_known:
            self.refuse("its data's rows were reordered in a way that could not be followed")
        if self._layout is None:
            return None
        if not self._layout.fits(tensor.shape):
            self.refuse(f"it is not known where the samples are in a tensor of shape {tuple(tensor.shape)}")
        return self._layout


def refusal(
    function: Callable[..., Any], rooted: Iterable[Derived], reason: str
) -> UnsupportedOperationError:
    """Returns the error that names the parameters, the operation, the reason and the ways out."""
    roots = list(dict.fromkeys(name for derived in rooted for name in derived.roots))
    return UnsupportedOperationError(
        f"{', '.join(roots[:3]) or 'the model'}: {resolve_name(function) or function} uses this "
        f"trainable parameter, but {reason}. Freeze it, add a rule with @operation_rule, or set strategy='loop'."
    )
