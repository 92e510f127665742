"""The form of gradients that were built from their factors, each sample's by itself.

The blocks of one sample are small enough for the gaps that a backward pass leaves
in a CPU's heap, where one block for all samples asks for new memory: building a
ViT-small's took 60 to 130 MB more that way.

Axes: B sample, K all axes of a parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_trainer.gradients.measures import GramCache, Measure, accumulation_dtype


@dataclass(frozen=True, eq=False)
class Built:
    """Sample b's gradient is stored: ``gradients[b]``, of the parameter's shape.

    Args:
        gradients: B tensors (K), in the accumulation dtype.
    """

    gradients: Sequence[Tensor]

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape."""
        return self.gradients[0].shape

    def dense(self) -> Tensor:
        """Returns the gradients themselves, (B, …)."""
        return torch.stack(list(self.gradients))

    def measure(self, _grams: GramCache | None = None) -> Measure:
        """Returns ‖gradient‖² and no spread: what is stored is what will be summed, so nothing cancels."""
        norms_B = torch.stack([torch.linalg.vector_norm(gradient) for gradient in self.gradients])
        return Measure(norms_B.square(), torch.zeros_like(norms_B))

    def select(self, keep_B: Tensor) -> Built:
        """Returns the form with exact zeros for samples that are not kept."""
        pairs = zip(self.gradients, keep_B.tolist(), strict=True)
        return Built([own if keep else own.new_zeros(()).expand(own.shape) for own, keep in pairs])

    def weighted_sum(self, factors_B: Tensor, total: Tensor | None) -> Tensor:
        """Returns ``total + Σ_b factors[b] · gradient[b]``; writes into ``total`` if given."""
        for gradient, factor in zip(self.gradients, factors_B.tolist(), strict=True):
            total = gradient * factor if total is None else total.add_(gradient, alpha=factor)
        assert total is not None
        return total


def build(uses: Sequence[tuple[Tensor, Tensor]]) -> Built:
    """Returns ``Σ_u Σ_t left_u[b, t] ⊗ right_u[b, t]`` of each sample; uses are added up in one place.

    Args:
        uses: Pairs of factors, (B, T, P) and (B, T, D); T may differ between uses.
    """
    dtype = accumulation_dtype(*itertools.chain(*uses))
    gradients = []
    for sample in range(uses[0][0].shape[0]):
        own = [(left_BTP[sample].to(dtype), right_BTD[sample].to(dtype)) for left_BTP, right_BTD in uses]
        total = own[0][0].T @ own[0][1]
        for left_TP, right_TD in own[1:]:
            total.addmm_(left_TP.T, right_TD)
        gradients.append(total)
    return Built(gradients)
