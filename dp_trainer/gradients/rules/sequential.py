"""Operations without a faster rule: run for each sample by itself, on its own copy of the parameters.

Exact for every function that keeps samples apart along the first axis; it costs
one small call a sample. ``einsum`` needs no loop: its copies get an axis.

Axes: B sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_trainer.gradients.rules.base import Call, operation_rule

_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(F.group_norm, F.bilinear, F.prelu),
)


def _one_sample_at_a_time(function: Callable[..., Any], call: Call, *args: Any, **kwargs: Any) -> Tensor:
    pieces = [
        function(*one_args, **dict(zip(kwargs, one_kwargs, strict=True)))
        for one_args, one_kwargs in zip(
            _by_sample(call, args), _by_sample(call, tuple(kwargs.values())), strict=True
        )
    ]
    if not all(isinstance(piece, Tensor) and piece.ndim for piece in pieces):
        call.refuse("its result for one sample is not a tensor with a sample axis")
    return torch.cat(pieces)


def _by_sample(call: Call, values: tuple[Any, ...]) -> list[list[Any]]:
    """The arguments of each of the B calls."""
    columns = []
    for value in values:
        if call.is_tracked(value):
            columns.append(call.copies(value))
        elif call.is_data(value):
            columns.append(call.samples(value))
        else:
            columns.append([value] * call.batch_size)
    return [[column[sample] for column in columns] for sample in range(call.batch_size)]


for _function in dict.fromkeys(_FUNCTIONS):
    operation_rule(_function)(functools.partial(_one_sample_at_a_time, _function))


@operation_rule(F.embedding_bag)
def embedding_bag(
    call: Call,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Sums or means of rows of ``weight`` (V, D), one bag a row of ``input`` (B, T)."""
    if offsets is not None or input.ndim != 2:
        call.refuse("bags given by offsets have no sample axis: pass one bag a row, (B, T)")
    if settings.get("max_norm") is not None or settings.get("scale_grad_by_freq"):
        call.refuse("max_norm changes the table, and scale_grad_by_freq couples samples")
    return _one_sample_at_a_time(F.embedding_bag, call, input, weight, **settings)


@operation_rule(F.instance_norm)
def instance_norm(
    call: Call,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalizes each channel of each sample, then scales and shifts it."""
    if running_mean is not None and use_input_stats:
        call.refuse("its running statistics would hold sample data that no noise protects")
    return _one_sample_at_a_time(
        F.instance_norm, call, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


@operation_rule(torch.einsum)
def einsum(call: Call, equation: str, *operands: Any) -> Tensor:
    """A sum of products whose data operands share the letter of the sample axis, and keep it in the result."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    data = [(t, o) for t, o in zip(terms, operands, strict=True) if not call.is_tracked(o)]
    axis = call.sample_axis
    letter = data[0][0][axis : axis + 1]
    shared = all(term[axis : axis + 1] == letter and term.count(letter) == 1 for term, _ in data)
    if "." in equation or not arrow or not letter or not shared or letter not in output:
        call.refuse(f"the sample axis of '{equation}' is not the same letter of all its data and its result")
    if axis == 0 and not output.startswith(letter):
        call.refuse(f"the result of '{equation}' does not begin with the sample axis")
    rows = data[0][1].shape[axis]
    if rows % call.batch_size:
        call.refuse(f"the axis '{letter}' of its data has {rows} rows for {call.batch_size} samples")
    spread_terms, spread = [], []
    for term, operand in zip(terms, operands, strict=True):
        if not call.is_tracked(operand):
            own_term, own = term, operand
        elif letter in term:
            # It was made for every sample, and meets each one's own data only.
            own_term, own = term, call.own_places(operand, term.index(letter))
        else:
            copies = torch.stack(call.copies(operand))
            own_term, own = letter + term, copies.repeat_interleave(rows // call.batch_size, 0)
        spread_terms.append(own_term)
        spread.append(own)
    return torch.einsum(f"{','.join(spread_terms)}->{output}", *spread)
