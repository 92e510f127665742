"""Whole layers that torch runs in one call: recurrent layers and multi-head attention.

Each sample runs by itself, on its own copy of the parameters.

Axes: B sample, T position, D width, L stacked layers and directions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_trainer.gradients.rules.base import Call, operation_rule

_RECURRENT: tuple[Callable[..., Any], ...] = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def _one_sample(call: Call, tensor: Tensor, axis: int, sample: int) -> Tensor:
    if tensor.ndim <= axis or tensor.shape[axis] != call.batch_size:
        call.refuse(
            f"a tensor of shape {tuple(tensor.shape)} does not hold one sample at each place of axis {axis}"
        )
    return tensor.narrow(axis, sample, 1)


def _recurrent(
    function: Callable[..., Any],
    call: Call,
    input: Tensor,  # noqa: A002
    hx: Tensor | tuple[Tensor, ...],
    params: Any,
    *settings: Any,
) -> tuple[Tensor, ...]:
    """A recurrent layer; ``settings`` are has_biases, num_layers, dropout, train, bidirectional, batch_first."""
    states = hx if isinstance(hx, list | tuple) else (hx,)
    if not isinstance(settings[0], bool):
        call.refuse("packed sequences mix the samples' rows: pass padded ones, (B, T, D)")
    if any(call.is_tracked(t) for t in (input, *states)):
        call.refuse("its input or first state is made from parameters")
    batch_axis = 0 if settings[-1] else 1
    if call.sample_axis not in (0, batch_axis):
        call.refuse(f"it takes the samples from axis {batch_axis}, and they are on axis {call.sample_axis}")
    copies = [call.copies(p) if call.is_tracked(p) else [p] * call.batch_size for p in params]
    results = []
    for sample in range(call.batch_size):
        own_states = [_one_sample(call, state, 1, sample).contiguous() for state in states]
        results.append(
            function(
                _one_sample(call, input, batch_axis, sample),
                own_states if len(states) > 1 else own_states[0],
                [copy[sample] for copy in copies],
                *settings,
            )
        )
    outputs, *last_states = zip(*results, strict=True)
    return torch.cat(outputs, batch_axis), *(torch.cat(states, 1) for states in last_states)


for _function in _RECURRENT:
    operation_rule(_function)(functools.partial(_recurrent, _function))

_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_SEQUENCES = frozenset({"query", "key", "value"})


@operation_rule(F.multi_head_attention_forward)
def multi_head_attention(call: Call, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention`` on (T, B, D), its projections included."""
    arguments = _ATTENTION.bind(*args, **kwargs).arguments
    if call.sample_axis > 1:
        call.refuse(f"it takes the samples from axis 1, and they are on axis {call.sample_axis}")
    copies = {name: call.copies(value) for name, value in arguments.items() if call.is_tracked(value)}
    pieces = []
    for sample in range(call.batch_size):
        own = {name: copy[sample] for name, copy in copies.items()}
        shares = {
            name: _share(call, name, own.get(name, value), sample, arguments["num_heads"])
            for name, value in arguments.items()
            if name not in own or name in _SEQUENCES
        }
        pieces.append(F.multi_head_attention_forward(**{**own, **shares}))
    weights = [weight for _, weight in pieces if weight is not None]
    return torch.cat([output for output, _ in pieces], 1), torch.cat(weights) if weights else None


def _share(call: Call, name: str, value: Any, sample: int, heads: int) -> Any:
    """One sample's share of an argument of the attention that is no weight."""
    if name in _SEQUENCES:
        return _one_sample(call, value, 1, sample)
    if name == "key_padding_mask" and value is not None:
        return _one_sample(call, value, 0, sample)
    if name == "attn_mask" and value is not None and value.ndim == 3:
        return value[sample * heads : (sample + 1) * heads]
    if call.is_data(value) and name != "attn_mask":
        call.refuse(f"its argument '{name}' holds sample data")
    return value
