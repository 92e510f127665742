"""Convolutions of any number of axes, with stride, padding, dilation and groups.

Axes: B sample, C channel, X one or more spatial axes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_trainer.gradients.measures import accumulation_dtype
from dp_trainer.gradients.rules.base import Call, operation_rule
from dp_trainer.gradients.stored import Materialized

_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@operation_rule(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    call: Call,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution of ``input`` (B, C, X…) with ``weight`` (C out, C in / groups, kernel…)."""
    axes = weight.ndim - 2
    if call.is_tracked(input):
        call.refuse("its input is made from parameters while its weight holds sample data")
    if input.ndim != axes + 2 or call.sample_axis or input.shape[0] % call.batch_size:
        call.refuse(f"its input of shape {tuple(input.shape)} has no sample axis of {call.batch_size}")
    settings = (stride, padding, dilation, groups)
    output = _FUNCTIONS[axes](input, call.value(weight), call.value(bias), *settings)
    data, plain_weight = input.detach(), call.value(weight)

    def weight_gradients(grad: Tensor) -> Materialized:
        return Materialized(
            torch.stack(
                [
                    _weight_gradient(inputs, plain_weight, grads, settings)
                    for inputs, grads in zip(
                        data.chunk(call.batch_size), grad.chunk(call.batch_size), strict=True
                    )
                ]
            )
        )

    def bias_gradients(grad: Tensor) -> Materialized:
        grad_BRCX = grad.reshape(call.batch_size, -1, grad.shape[1], grad[0, 0].numel())
        return Materialized(grad_BRCX.sum((1, 3), dtype=accumulation_dtype(grad)))

    return call.watch(output, (weight, weight_gradients), (bias, bias_gradients))


def _weight_gradient(
    inputs: Tensor, weight: Tensor, grads: Tensor, settings: tuple[Any, Any, Any, int]
) -> Tensor:
    """One sample's weight gradient, by torch's own backward of the convolution."""
    dtype = accumulation_dtype(weight)
    variable = weight.detach().to(dtype).requires_grad_()
    with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
        output = _FUNCTIONS[weight.ndim - 2](inputs.to(dtype), variable, None, *settings)
    (gradient,) = torch.autograd.grad(output, variable, grads.to(dtype))
    return gradient
