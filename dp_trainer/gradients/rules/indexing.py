"""Parameters read at indices from sample data, and written to places that sample data say.

Axes: B sample, T position, K any trailing axes of a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dp_trainer.gradients.forms import RowScatter
from dp_trainer.gradients.rules.base import Call, operation_rule
from dp_trainer.gradients.stored import Materialized


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


@operation_rule(Tensor.__setitem__)
def put(call: Call, input: Tensor, index: Any, value: Any) -> None:  # noqa: A002
    """Writes parameters into sample data (B, …) where a mask of its leading axes says so."""
    masked = isinstance(index, Tensor) and index.dtype == torch.bool and not call.is_tracked(input)
    if not masked or index.shape != input.shape[: index.ndim]:
        call.refuse("only writing where a mask of the data's first axes says so is known")
    if value.ndim > input.ndim - index.ndim:
        call.refuse("what it writes has an axis for the places of the mask")
    mask = index.view(*index.shape, *[1] * (input.ndim - index.ndim))
    copy = call.per_sample_copy(value, input.shape)
    input.copy_(torch.where(mask, copy.to(input.dtype), input.clone()))
