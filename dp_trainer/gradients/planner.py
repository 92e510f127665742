"""Chooses the cheaper of two exact ways to a norm, from the current shapes.

The ghost norm of an outer product costs about T²(P + D) multiplications a
sample and keeps nothing. Building the gradient costs T·P·D and P·D memory, but
a built gradient also serves the weighted sum, which saves T·P·D there. The
choice never changes a result beyond rounding.

Axes: B sample, T position, P first weight axis, D second.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dp_trainer.gradients.forms import Form, Materialized, OuterProduct, sum_dense, sum_squared_norms
from dp_trainer.gradients.measures import GramCache

# What touching one element of a built gradient costs, in multiplications of a matrix product: it is written
# once and read twice. Measured on two CPUs: building wins from T ≈ 180 at P = D = 768.
_COST_OF_AN_ELEMENT = 84
# Built gradients of one parameter's uses are kept up to this many bytes a micro-batch.
_LARGEST_KEPT = 256 * 2**20


def squared_norms(forms: Sequence[Form], grams: GramCache | None = None) -> tuple[Tensor, list[Form]]:
    """Returns one parameter's squared norms (B,) and the forms to use for its weighted sum.

    Args:
        forms: All uses of the parameter in one micro-batch.
        grams: Gram matrices that may serve again.
    """
    if _should_build(forms):
        built = Materialized(sum_dense(forms))
        return built.measure().squares_B, [built]
    return sum_squared_norms(forms, grams), list(forms)


def _should_build(forms: Sequence[Form]) -> bool:
    outer = [form for form in forms if isinstance(form, OuterProduct)]
    if not outer:
        return False
    height, width = outer[0].shape
    elements = height * width
    kept_bytes = 4 * outer[0].left_BTP.shape[0] * elements
    if kept_bytes > _LARGEST_KEPT:
        return False
    positions = [form.left_BTP.shape[1] for form in outer]
    # Every pair of uses has a Gram product; (Σ T)² counts the pairs of a shared weight.
    ghost = sum(positions) ** 2 * (height + width)
    return ghost > _COST_OF_AN_ELEMENT * elements
