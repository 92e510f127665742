"""Slow twins: the obvious way to what the package does fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dp_trainer.batches import micro_batch_size, sample_of


def per_sample_gradients(model: nn.Module, micro_batch, per_sample_loss) -> list[dict[str, Tensor]]:
    """One dictionary of gradients a sample, by plain autograd on that sample alone."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result = []
    for index in range(micro_batch_size(micro_batch)):
        loss = per_sample_loss(model, sample_of(micro_batch, index)).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        result.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(parameters.items(), gradients, strict=True)
            }
        )
    return result


def norms(gradients: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack(
        [torch.cat([g.flatten().double() for g in sample.values()]).norm() for sample in gradients]
    )


def clipped_sum(gradients: list[dict[str, Tensor]], factors: Tensor) -> dict[str, Tensor]:
    return {
        name: sum(float(f) * sample[name].double() for f, sample in zip(factors, gradients, strict=True))
        for name in gradients[0]
    }


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Relative distance of two dictionaries of tensors, as one vector."""
    assert first.keys() == second.keys()
    difference = torch.stack([(first[name].double() - second[name].double()).norm() for name in first]).norm()
    size = torch.stack([tensor.double().norm() for tensor in second.values()]).norm()
    return float(difference / size)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that is spread over ranks, all of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
