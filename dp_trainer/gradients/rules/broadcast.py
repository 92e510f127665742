"""The broadcast rule: spread a small tensor over the samples before it meets them.

When a parameter, or a tensor derived from one, meets sample data in an
operation that broadcasts, it is first expanded along the leading sample axis.
The gradient that arrives at the expanded tensor is the per-sample gradient.
This covers the scales of all hand-written norms, layer scales, class tokens,
position tables and relative biases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_trainer.gradients.rules.base import Call, operation_rule

_OUT_OF_PLACE: tuple[Callable[..., Any], ...] = (
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
    *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, torch.rsub),
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply),
    *(torch.div, Tensor.div, Tensor.__truediv__, Tensor.__rtruediv__, torch.true_divide),
    *(torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__rpow__),
    *(torch.maximum, torch.minimum, Tensor.maximum, Tensor.minimum),
    *(torch.where, Tensor.where, torch.masked_fill, Tensor.masked_fill),
    *(torch.addcmul, Tensor.addcmul, torch.lerp, Tensor.lerp),
)
_IN_PLACE: tuple[Callable[..., Any], ...] = (
    *(Tensor.add_, Tensor.__iadd__, Tensor.sub_, Tensor.__isub__),
    *(Tensor.mul_, Tensor.__imul__, Tensor.div_, Tensor.__itruediv__),
)


def _broadcast(function: Callable[..., Any], call: Call, *args: Any, **kwargs: Any) -> Any:
    """Runs ``function`` with each tracked argument expanded over the samples."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    shape = _broadcast_shape([t.shape for t in tensors])
    data = [t for t in tensors if not call.is_tracked(t)]
    if not any(t.ndim == len(shape) and t.shape[:1] == shape[:1] for t in data):
        call.refuse(f"no sample data among its arguments brings the first axis of the result, {tuple(shape)}")
    return function(
        *(call.per_sample_copy(a, shape) if call.is_tracked(a) else a for a in args),
        **{k: call.per_sample_copy(a, shape) if call.is_tracked(a) else a for k, a in kwargs.items()},
    )


def _broadcast_shape(shapes: list[torch.Size]) -> tuple[int, ...]:
    """The shape of the result; shapes that do not fit each other are left to the function's own error.

    ``torch.broadcast_shapes`` is dearer than the multiplication of a small step.
    """
    axes = max(map(len, shapes))
    padded = [(*[1] * (axes - len(shape)), *shape) for shape in shapes]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded, strict=True))


def _broadcast_in_place(function: Callable[..., Any], call: Call, *args: Any, **kwargs: Any) -> Any:
    if call.is_tracked(args[0]):
        call.refuse("it writes sample data into a tensor made from parameters")
    return _broadcast(function, call, *args, **kwargs)


for _function in dict.fromkeys(_OUT_OF_PLACE):
    operation_rule(_function)(functools.partial(_broadcast, _function))
for _function in dict.fromkeys(_IN_PLACE):
    operation_rule(_function)(functools.partial(_broadcast_in_place, _function))


@operation_rule(torch.cat, torch.concat, torch.concatenate)
def concatenate(call: Call, tensors: Any, dim: int = 0) -> Tensor:
    """Joins along an axis other than the sample axis."""
    return torch.cat(_aligned(call, tensors, dim, new_axis=False), dim)


@operation_rule(torch.stack)
def stack(call: Call, tensors: Any, dim: int = 0) -> Tensor:
    """Joins along a new axis other than the first."""
    return torch.stack(_aligned(call, tensors, dim, new_axis=True), dim)


def _aligned(call: Call, tensors: Any, dim: int, *, new_axis: bool) -> list[Tensor]:
    if dim % (tensors[0].ndim + new_axis) == 0:
        call.refuse("it joins tensors along the sample axis")
    return [call.per_sample_copy(t, t.shape) if call.is_tracked(t) else t for t in tensors]


@operation_rule(Tensor.expand_as)
def expand_as(call: Call, input: Tensor, other: Tensor) -> Tensor:  # noqa: A002
    """Expands a derived tensor to the shape of sample data."""
    if not call.is_tracked(input):
        call.refuse("only a tensor made from parameters alone may take its shape from sample data")
    return call.derive(Tensor.expand, input, other.shape)  # type: ignore[no-any-return]


@operation_rule(Tensor.type_as)
def type_as(call: Call, input: Tensor, other: Tensor) -> Tensor:  # noqa: A002
    """Casts to the dtype of another tensor, which contributes nothing else."""
    if call.is_tracked(input):
        return call.derive(Tensor.to, input, other.dtype)  # type: ignore[no-any-return]
    return input.to(other.dtype)


@operation_rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with a learned bias as its mask, or with learned queries, keys or values."""
    operands = [query, key, value, attn_mask]
    rows = next(t.shape[0] for t in operands if t is not None and not call.is_tracked(t))
    shape = (rows, *[1] * (max(t.ndim for t in operands if t is not None) - 1))
    spread = [call.per_sample_copy(t, shape) if t is not None and call.is_tracked(t) else t for t in operands]
    return F.scaled_dot_product_attention(
        spread[0],  # type: ignore[arg-type]
        spread[1],  # type: ignore[arg-type]
        spread[2],  # type: ignore[arg-type]
        attn_mask=spread[3],
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
