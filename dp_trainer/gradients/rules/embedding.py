"""Look-ups of table rows by the samples' own indices.

Axes: B sample, T position, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dp_trainer.gradients.derived import padded_values
from dp_trainer.gradients.forms import RowScatter
from dp_trainer.gradients.rules.base import Call, operation_rule


@operation_rule(F.embedding)
def embedding(
    call: Call,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of ``weight`` (V, D) at integer indices of any shape that begins with the sample axis."""
    if max_norm is not None:
        call.refuse(
            f"max_norm={max_norm} with norm_type={norm_type} changes the table during the forward pass"
        )
    if scale_grad_by_freq:
        call.refuse("scale_grad_by_freq couples samples: one's gradient depends on the others' words")
    if sparse:
        call.refuse("sparse=True gives gradients that show which rows the samples used")
    if input.ndim > 1 and input.shape[0] == 1 != call.batch_size:
        # One row of indices for all samples, as of positions or of a prompt. No gradient passes through
        # integers, so what is looked up depends on the table alone.
        return call.derive(F.embedding, input, weight, padding_idx)  # type: ignore[no-any-return]
    rows = weight.shape[0]
    rows_BT = call.by_sample(input.unsqueeze(-1)).squeeze(-1)
    padding_row = None if padding_idx is None else padding_idx % rows

    def scattered(grad: Tensor) -> RowScatter:
        return RowScatter(rows_BT, padded_values(rows_BT, call.by_sample(grad), padding_row), rows)

    return call.watch(F.embedding(input, call.value(weight)), (weight, scattered))
