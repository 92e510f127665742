"""Stacks of weights of which each position uses one: mixtures of experts.

Axes: R row, B sample, T position, E expert, D input width, P output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_trainer.gradients.rules.base import Call, FormMaker, operation_rule
from dp_trainer.gradients.slots import SlottedOuterProduct
from dp_trainer.gradients.stored import Materialized


def grouped_product(
    call: Call,
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of ``mat_a`` (R, D), sorted by expert, each times its expert's weight in ``mat_b`` (E, D, P).

    Expert e's rows end before row ``offs[e]``.
    """
    weighted = call.is_tracked(mat_b) and mat_b.ndim == 3 and mat_a.ndim == 2
    if call.is_tracked(mat_a) or not weighted or offs is None or bias is not None:
        call.refuse("only rows of sample data grouped over a stack of weights, without a bias, are known")
    output = _GROUPED(mat_a, call.value(mat_b), offs=offs, out_dtype=out_dtype)
    experts_R = torch.searchsorted(offs, torch.arange(len(mat_a), device=offs.device), right=True)
    # Rows behind the last expert's are not computed, and hold anything.
    used_R1 = (experts_R < mat_b.shape[0])[:, None]
    last = mat_b.shape[0] - 1
    slots_BT = call.by_sample(experts_R.clamp(max=last)[:, None]).squeeze(-1)
    inputs_BTD = call.by_sample(mat_a.detach().masked_fill(~used_R1, 0))

    def stacked(grad: Tensor) -> SlottedOuterProduct:
        grads_BTP = call.by_sample(grad.masked_fill(~used_R1, 0))
        return SlottedOuterProduct(inputs_BTD, grads_BTP, slots_BT, mat_b.shape[0])

    return call.watch(output, (mat_b, stacked))


# Public since torch 2.10; the private name is what older callers use.
_GROUPED = F.grouped_mm
operation_rule(F.grouped_mm, torch._grouped_mm)(grouped_product)


@operation_rule(torch.bmm, Tensor.bmm)
def batched_product(call: Call, input: Tensor, mat2: Tensor) -> Tensor:  # noqa: A002
    """``input`` (E, R, D) times a stack of weights (E, D, P): all experts at once, rows sample-major."""
    if call.is_tracked(input) or not call.is_tracked(mat2):
        call.refuse("only sample data times a stack of weights on its right is known")
    if call.repeats_batch(mat2) and call.sample_axis == 0:
        return torch.bmm(input, call.per_sample_copy(mat2, (input.shape[0], 1, 1)))
    return call.watch(torch.bmm(input, call.value(mat2)), (mat2, _stack_of_products(call, input, mat2)))


@operation_rule(torch.baddbmm, Tensor.baddbmm)
def batched_product_with_bias(
    call: Call,
    input: Tensor,  # noqa: A002
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    """As ``batched_product``, with a bias (E, 1, P) for each weight."""
    stacked = call.is_tracked(batch2) and not call.is_tracked(batch1)
    if not stacked or (beta, alpha) != (1, 1) or input.shape != (batch2.shape[0], 1, batch2.shape[2]):
        call.refuse("only sample data times a stack of weights, plus a bias for each, is known")
    output = torch.baddbmm(call.value(input), batch1, call.value(batch2))

    def summed(grad: Tensor) -> Materialized:
        grads_BXP = _samples_first(call, grad)
        batch, _, width = grads_BXP.shape
        return Materialized(grads_BXP.view(batch, input.shape[0], -1, width).sum(2, keepdim=True))

    return call.watch(output, (batch2, _stack_of_products(call, batch1, batch2)), (input, summed))


def _samples_first(call: Call, tensor_ERD: Tensor) -> Tensor:
    """Data of all experts, rows sample-major, as (B, E · rows of a sample, D)."""
    experts, rows, width = tensor_ERD.shape
    if call.sample_axis not in (0, 1) or rows % call.batch_size:
        call.refuse(f"its data of shape {tuple(tensor_ERD.shape)} has no second axis over the samples")
    split_EBTD = tensor_ERD.detach().reshape(experts, call.batch_size, rows // call.batch_size, width)
    return split_EBTD.transpose(0, 1).flatten(1, 2)


def _stack_of_products(call: Call, data_ERD: Tensor, weights_EDP: Tensor) -> FormMaker:
    inputs_BXD = _samples_first(call, data_ERD)
    experts = weights_EDP.shape[0]
    slots_X = torch.arange(experts, device=data_ERD.device).repeat_interleave(inputs_BXD.shape[1] // experts)
    slots_BX = slots_X.expand(call.batch_size, -1)
    return lambda grad: SlottedOuterProduct(inputs_BXD, _samples_first(call, grad), slots_BX, experts)
