"""Matrix products of sample data with a weight.

Axes: B sample, T position, D input width, P output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_trainer.gradients.forms import OuterProduct
from dp_trainer.gradients.measures import accumulation_dtype
from dp_trainer.gradients.rules.base import Call, operation_rule
from dp_trainer.gradients.rules.experts import batched_product
from dp_trainer.gradients.stored import Materialized


@operation_rule(F.linear)
def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """``input @ weightᵀ + bias``, weight (P, D)."""
    if call.is_tracked(input):
        call.refuse("its input is made from parameters while its weight holds sample data")
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        call.refuse(
            f"its weight has shape {tuple(weight.shape)}, and only (P, D) with a bias of (P,) is known"
        )
    output = F.linear(input, call.value(weight), call.value(bias))
    inputs_BTD = _as_multiplied(call, input, output)
    return call.watch(
        output,
        (weight, lambda grad: OuterProduct(call.by_sample(grad), inputs_BTD)),
        (bias, lambda grad: _summed_over_positions(call, grad)),
    )


@operation_rule(torch.addmm, Tensor.addmm)
def addmm(
    call: Call,
    input: Tensor,  # noqa: A002
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    """``beta · input + alpha · mat1 @ mat2``, mat2 (D, P) a weight, input (P,) its bias."""
    if call.is_tracked(mat1):
        call.refuse("its first matrix is made from parameters")
    if call.is_tracked(input) and input.shape != mat2.shape[1:]:
        call.refuse(f"its added term has shape {tuple(input.shape)}, and only a bias of (P,) is known")
    output = torch.addmm(call.value(input), mat1, call.value(mat2), beta=beta, alpha=alpha)
    inputs_BTD = _as_multiplied(call, mat1, output)
    return call.watch(
        output,
        (mat2, lambda grad: OuterProduct(inputs_BTD, call.by_sample(grad if alpha == 1 else grad * alpha))),
        (input, lambda grad: _summed_over_positions(call, grad if beta == 1 else grad * beta)),
    )


@operation_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(call: Call, input: Tensor, other: Tensor) -> Tensor:  # noqa: A002
    """``input @ other``: a two-axis weight on the right, or any weight spread over the samples."""
    if call.is_tracked(other) and not call.is_tracked(input) and other.ndim == 2 and input.ndim >= 2:
        output = input @ call.value(other)
        inputs_BTD = _as_multiplied(call, input, output)
        return call.watch(
            output,
            (other, lambda grad: OuterProduct(inputs_BTD, call.by_sample(grad))),
        )
    data = input if call.is_tracked(other) else other
    if data.ndim < 3 or input.ndim < 2 or other.ndim < 2:
        call.refuse("a weight on this side of a product without a batch axis has no known sample axis")
    axis = call.sample_axis
    if axis == 1 and data is input and input.ndim == other.ndim == 3 and other.shape[0] == input.shape[0] > 1:
        return batched_product(call, input, other)
    if axis >= data.ndim - 2 or max(input.ndim, other.ndim) != data.ndim:
        call.refuse("the samples are in one of the two axes that it multiplies")
    shape = (*data.shape[: axis + 1], *[1] * (data.ndim - axis - 1))
    return torch.matmul(
        *(call.per_sample_copy(t, shape) if call.is_tracked(t) else t for t in (input, other))
    )


@operation_rule(Tensor.__rmatmul__)
def reflected_matmul(call: Call, input: Tensor, other: Tensor) -> Tensor:  # noqa: A002
    """``other @ input``."""
    return matmul(call, other, input)


def _as_multiplied(call: Call, input: Tensor, output: Tensor) -> Tensor:  # noqa: A002
    """The input as (B, T, D), in the dtype in which autocast let it be multiplied."""
    return call.by_sample(input).to(output.dtype)


def _summed_over_positions(call: Call, grad: Tensor) -> Materialized:
    grad_BTP = call.by_sample(grad)
    return Materialized(grad_BTP.sum(1, dtype=accumulation_dtype(grad_BTP)))
