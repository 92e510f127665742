"""Layer and root-mean-square normalization with a learned scale and shift.

Axes: B sample, T position, K the normalized axes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dp_trainer.gradients.measures import accumulation_dtype
from dp_trainer.gradients.rules.base import Call, FormMaker, operation_rule
from dp_trainer.gradients.stored import Materialized


@operation_rule(F.layer_norm)
def layer_norm(
    call: Call,
    input: Tensor,  # noqa: A002
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalizes the last axes, then scales and shifts them."""
    output = F.layer_norm(input, normalized_shape, call.value(weight), call.value(bias), eps)
    data = input.detach()
    # Normalizing again in the backward pass costs little and keeps no second copy of the activations.
    scaled = _summed(call, normalized_shape, lambda: F.layer_norm(data, normalized_shape, eps=eps))
    return call.watch(output, (weight, scaled), (bias, _summed(call, normalized_shape)))


@operation_rule(F.rms_norm)
def rms_norm(
    call: Call,
    input: Tensor,  # noqa: A002
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Divides by the root mean square of the last axes, then scales them."""
    output = F.rms_norm(input, normalized_shape, call.value(weight), eps)
    data = input.detach()
    return call.watch(
        output, (weight, _summed(call, normalized_shape, lambda: F.rms_norm(data, normalized_shape, eps=eps)))
    )


@operation_rule(F.batch_norm)
def batch_norm(
    call: Call,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """With stored statistics, a fixed scale and shift of each channel of ``input`` (B, C, …)."""
    if training or running_mean is None or running_var is None:
        call.refuse(
            "batch normalization in training mode couples samples; call dp_trainer.freeze_batch_norm(model)"
        )
    output = F.batch_norm(
        input, running_mean, running_var, call.value(weight), call.value(bias), False, momentum, eps
    )
    data = input.detach()

    def channel_sums(product: Tensor) -> Materialized:
        product_RCX = product.reshape(*product.shape[:2], -1)
        return Materialized(call.sum_by_sample(product_RCX.sum(2, dtype=accumulation_dtype(product))))

    def scaled(grad: Tensor) -> Materialized:
        return channel_sums(grad * F.batch_norm(data, running_mean, running_var, eps=eps))

    return call.watch(output, (weight, scaled), (bias, channel_sums))


def _summed(call: Call, shape: list[int], multiplier: object = None) -> FormMaker:
    """Σ over positions of the output's gradient, times the normalized input for a scale."""

    def make(grad: Tensor) -> Materialized:
        product = grad * multiplier() if callable(multiplier) else grad
        product_BTK = call.by_sample(product.flatten(-len(shape)))
        summed_BK = product_BTK.sum(1, dtype=accumulation_dtype(product_BTK))
        return Materialized(summed_BK.view(call.batch_size, *shape))

    return make
