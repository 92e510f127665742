"""Tensors made from parameters alone, and the way back to the parameter.

A cast, a view, a transpose, ``1 + weight``, ``exp(weight)`` or a looked-up
position row hold no sample data: each is *derived*. A form recorded for a
derived tensor is carried back to the parameters it came from. Links whose
gradient is only relabelled keep their compact form; any other chain is pulled
back per sample through its own autograd graph, which is exact and cheap because
such tensors are small.

Axes: B sample, T position, D width, K axes of the derived tensor.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_trainer.errors import UnsupportedOperationError
from dp_trainer.gradients.forms import Form, OuterProduct, RowScatter, is_complex, samples_of
from dp_trainer.gradients.slots import SlottedOuterProduct
from dp_trainer.gradients.stored import Materialized


class Link(enum.Enum):
    """How a derived tensor's gradient maps to that of its base."""

    SAME = "the gradient is the base's (a cast, a copy, an added constant)"
    TRANSPOSED = "the gradient is the base's, with its last two axes swapped"
    SLOT = "one weight of a stack, picked by its number"
    ROWS = "rows of the base, picked by constant indices"
    EXPANDED = "the base, repeated along its first axis or a new one, and perhaps broadcast along others"
    GENERAL = "anything else: through the autograd graph"


@dataclass(frozen=True, eq=False)
class Derived:
    """A tensor that depends on parameters and constants only.

    Args:
        tensor: The tensor itself; its autograd graph leads to the parameters.
        roots: Names of the trainable parameters it depends on.
        link: How its gradient maps to the base's.
        base: What it was made from in one step; None for a parameter itself.
        rows: For ``Link.ROWS``, the indices, any shape.
        padding_row: For ``Link.ROWS``, the row that gets no gradient, if any.
        slot: For ``Link.SLOT``, the weight's number.
        batch_first: Whether the forward pass itself gave it a first axis by repeating or looking up,
            so that this axis may run over the samples.
    """

    tensor: Tensor
    roots: tuple[str, ...]
    link: Link = Link.SAME
    base: Derived | None = None
    rows: Tensor | None = None
    padding_row: int | None = None
    slot: int = 0
    batch_first: bool = False


def padded_values(rows_BT: Tensor, values_BTD: Tensor, padding_row: int | None) -> Tensor:
    """Returns the values with those of the padding row set to zero, as ``F.embedding`` does."""
    if padding_row is None:
        return values_BTD
    return values_BTD.masked_fill((rows_BT == padding_row)[:, :, None], 0)


def check_recorded(derived: Derived, form: Form, batch_size: int) -> None:
    """Refuses a form that cannot be what the samples contribute.

    Raises:
        UnsupportedOperationError: If it has another number of samples, or is a product of complex numbers.
    """
    names, samples = ", ".join(derived.roots[:3]), samples_of(form)
    if samples != {batch_size}:
        raise UnsupportedOperationError(
            f"{names}: its gradient has {max(samples - {batch_size})} samples instead of {batch_size}. Freeze it or set strategy='loop'."
        )
    if not isinstance(form, Materialized) and is_complex(form):
        raise UnsupportedOperationError(
            f"{names}: used in a product or a look-up of complex numbers, and forms have no conjugates. Freeze it or "
            "set strategy='loop'."
        )


def to_parameters(
    derived: Derived, form: Form, *, aligned: bool, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Form]]:
    """Carries a form of a derived tensor back to its parameters.

    Args:
        derived: The tensor that the form belongs to.
        form: Its per-sample gradients. Where ``aligned``, a ``Materialized``
            form whose sample b covers only sample b's rows of the tensor's
            first axis: its shape is (B, rows per sample, …).
        aligned: Whether the tensor's own first axis runs over the samples.
        parameters: The trainable parameters by name.

    Yields:
        The parameter's name and a form of the parameter's shape.
    """
    if aligned:
        yield from _aligned_to_parameters(derived, form, parameters)
        return
    match derived.link:
        case Link.SAME if derived.base is None:
            name = derived.roots[0]
            yield name, _stored_like(form, parameters[name])
        case Link.SAME:
            assert derived.base is not None
            yield from to_parameters(
                derived.base, _stored_like(form, derived.base.tensor), aligned=False, parameters=parameters
            )
        case Link.TRANSPOSED:
            assert derived.base is not None
            if isinstance(form, OuterProduct | SlottedOuterProduct):
                swapped: Form = form.transposed()
            else:
                swapped = Materialized(form.dense().mT)
            yield from to_parameters(derived.base, swapped, aligned=False, parameters=parameters)
        case Link.SLOT:
            assert derived.base is not None
            slotted = _in_slot(form, derived.slot, derived.base.tensor.shape)
            yield from to_parameters(derived.base, slotted, aligned=False, parameters=parameters)
        case Link.ROWS:
            assert derived.base is not None
            assert derived.rows is not None
            values = form.dense()
            batch, width = values.shape[0], derived.base.tensor.shape[1]
            rows_BT = derived.rows.reshape(1, -1).expand(batch, -1)
            yield from _scatter(derived, rows_BT, values.reshape(batch, -1, width), parameters)
        case Link.EXPANDED:
            assert derived.base is not None
            base_shape = derived.base.tensor.shape
            gradients = form.dense()
            reduced = torch.stack([sample.sum_to_size(base_shape) for sample in gradients])
            yield from to_parameters(
                derived.base, Materialized(reduced), aligned=False, parameters=parameters
            )
        case Link.GENERAL:
            yield from _pull_back(derived, form.dense(), parameters)


def _aligned_to_parameters(
    derived: Derived, form: Form, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Form]]:
    gradients = form.dense()  # (B, rows per sample, …)
    batch = gradients.shape[0]
    if derived.link is Link.ROWS:
        assert derived.rows is not None
        rows_BT = derived.rows.reshape(batch, -1)
        yield from _scatter(derived, rows_BT, gradients.reshape(batch, rows_BT.shape[1], -1), parameters)
    elif derived.link is Link.EXPANDED:
        assert derived.base is not None
        summed = gradients.sum(1)
        shape = derived.base.tensor.shape
        inner = shape[max(0, len(shape) - summed.ndim + 1) :]
        reduced = torch.stack([sample.sum_to_size(inner).reshape(shape) for sample in summed])
        yield from to_parameters(derived.base, Materialized(reduced), aligned=False, parameters=parameters)
    else:
        rows_per_sample = gradients.shape[1]
        yield from _pull_back_rows(derived, gradients, rows_per_sample, parameters)


def _scatter(
    derived: Derived, rows_BT: Tensor, values_BTD: Tensor, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Form]]:
    assert derived.base is not None
    values = padded_values(rows_BT, values_BTD, derived.padding_row)
    form = RowScatter(rows_BT, values, derived.base.tensor.shape[0])
    yield from to_parameters(derived.base, form, aligned=False, parameters=parameters)


def _pull_back(
    derived: Derived, gradients_BK: Tensor, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Form]]:
    """Vector-Jacobian products of all samples at once, through the derived tensor's graph."""
    pulled = torch.autograd.grad(
        derived.tensor,
        [parameters[name] for name in derived.roots],
        gradients_BK.to(derived.tensor.dtype),
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    if all(gradients is None for gradients in pulled):
        raise UnsupportedOperationError(
            f"{derived.roots[0]}: a tensor made from it has a gradient that does not lead back to it. Freeze the "
            "parameter or set strategy='loop'."
        )
    for name, gradients in zip(derived.roots, pulled, strict=True):
        if gradients is not None:
            yield name, Materialized(gradients)


def _pull_back_rows(
    derived: Derived, gradients: Tensor, rows_per_sample: int, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Form]]:
    """As ``_pull_back``, each sample's gradient set into its own rows of a zero tensor."""
    collected: dict[str, list[Tensor]] = {}
    for sample, rows in enumerate(gradients):
        masked = torch.zeros_like(derived.tensor)
        masked[sample * rows_per_sample : (sample + 1) * rows_per_sample] = rows
        for name, form in _pull_back(derived, masked[None], parameters):
            collected.setdefault(name, []).append(form.dense())
    for name, parts in collected.items():
        yield name, Materialized(torch.cat(parts))


def _in_slot(form: Form, slot: int, shape: torch.Size) -> Form:
    """A form of one weight of a stack as a form of the stack."""
    if isinstance(form, OuterProduct):
        slots_BT = torch.full(form.left_BTP.shape[:2], slot, device=form.left_BTP.device)
        return SlottedOuterProduct(form.left_BTP, form.right_BTD, slots_BT, shape[0])
    gradients = form.dense()
    stacked = gradients.new_zeros(gradients.shape[0], *shape)
    stacked[:, slot] = gradients
    return Materialized(stacked)


def _stored_like(form: Form, base: Tensor) -> Form:
    """Stored gradients in the base's shape, and in its dtype where that is wider."""
    if not isinstance(form, Materialized):
        return form
    gradients_BK = form.gradients_BK
    if gradients_BK.dtype == base.dtype and gradients_BK.shape[1:] == base.shape:
        return form
    dtype = torch.promote_types(gradients_BK.dtype, base.dtype)
    return Materialized(gradients_BK.to(dtype).reshape(gradients_BK.shape[0], *base.shape))
