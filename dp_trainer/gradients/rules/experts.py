"""Stacks of weights of which each position uses one: mixtures of experts, and data-dependent picks.

Axes: R row, B sample, T position, E expert, D input width, P output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_trainer.gradients.forms import Materialized, RowScatter
from dp_trainer.gradients.rules.base import Call, operation_rule
from dp_trainer.gradients.slots import SlottedOuterProduct


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
    slots_BT = call.by_sample(experts_R[:, None]).squeeze(-1)
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
    if input.shape[1] % call.batch_size:
        call.refuse(f"its data of shape {tuple(input.shape)} has no second axis over the samples")
    experts = mat2.shape[0]

    def rows_first(tensor: Tensor) -> Tensor:
        batch = call.batch_size
        split_EBTD = tensor.detach().reshape(experts, batch, tensor.shape[1] // batch, tensor.shape[2])
        return split_EBTD.transpose(0, 1).flatten(1, 2)

    inputs_BTD = rows_first(input)
    positions = input.shape[1] // call.batch_size
    slots_T = torch.arange(experts, device=input.device).repeat_interleave(positions)
    slots_BT = slots_T.expand(call.batch_size, -1)
    return call.watch(
        torch.bmm(input, call.value(mat2)),
        (mat2, lambda grad: SlottedOuterProduct(inputs_BTD, rows_first(grad), slots_BT, experts)),
    )


@operation_rule(Tensor.__getitem__)
def pick(call: Call, input: Tensor, index: Any) -> Tensor:  # noqa: A002
    """Entries of a table at the samples' own indices, or one weight of a stack at a number from data."""
    if not call.is_tracked(input) or not isinstance(index, Tensor) or index.is_floating_point():
        call.refuse("only a table of parameters indexed by one tensor of integers is known")
    if index.dtype in (torch.bool, torch.uint8):
        call.refuse("its mask is made from sample data")
    if index.ndim == 0:
        return call.derive(Tensor.__getitem__, input, int(index))  # type: ignore[no-any-return]
    rows_BT = call.by_sample(index.unsqueeze(-1)).squeeze(-1) % input.shape[0]

    def scattered(grad: Tensor) -> RowScatter | Materialized:
        entries = grad.reshape(*index.shape, -1)
        values_BTK = call.by_sample(entries)
        table = RowScatter(rows_BT, values_BTK, input.shape[0])
        return table if input.ndim == 2 else Materialized(table.dense().view(len(rows_BT), *input.shape))

    return call.watch(call.value(input)[index], (input, scattered))
