"""Models whose parameters are spread over ranks by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Such a model holds a shard of each parameter. Before a block runs, the whole
parameter is gathered into another tensor, and freed afterwards; the capture is
told of those tensors as they come. What FSDP does with gradients of the backward
pass does not happen, as the capture leaves none: each clipped sum is reduced
here, one parameter at a time, so no rank ever holds more than its shard of it.

All ranks take part in every forward and backward pass and every reduction, each
with samples of its own: they must see equally many micro-batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate

from dp_trainer.errors import UnsupportedOperationError
from dp_trainer.gradients.measures import squared_lengths


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 spreads the model's parameters over ranks; asked several times a step, so it looks at the root alone."""
    return isinstance(model, FSDPModule)


def put_to_rest(model: nn.Module) -> bool:
    """Frees what a forward pass without a backward pass, as an evaluation is, left gathered.

    Else ``named_parameters`` would give whole parameters, and gradients would be put where no optimizer looks.

    Returns:
        Whether the model is sharded; as ``is_sharded``.

    Raises:
        UnsupportedOperationError: If its parameters are spread by something else.
    """
    if not is_sharded(model):
        spread = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
        if spread is not None:
            raise UnsupportedOperationError(
                f"{spread}: this parameter is spread over ranks, but not by FSDP2 around the whole model. Tensor and "
                "context parallelism split samples or parameters in ways without a rule; use FSDP2 (fsdp_version: 2)."
            )
        return False
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return True


class Learner(Protocol):
    """What is told of whole parameters: the capture."""

    looks_away: bool
    """Whether torch calls pass unseen. FSDP's own would be taken for constants, and their buffers kept."""

    def learn(self, name: str, parameter: Tensor) -> None:
        """Takes a tensor for the parameter of that name."""


@contextlib.contextmanager
def gathered_parameters(model: nn.Module, learner: Learner) -> Iterator[None]:
    """While inside, tells of each whole parameter, by its name in the sharded model, before a block uses it.

    FSDP's hooks run unseen, and so do a block's other hooks; a parameter that these use leaves a gradient,
    which the capture refuses.
    """
    if not is_sharded(model):
        yield
        return
    names: dict[int, str] = {id(p): name for name, p in model.named_parameters()}
    canonical = {
        alias: names[id(p)] for alias, p in model.named_parameters(remove_duplicate=False) if id(p) in names
    }
    handles = []

    def look_away(_module: nn.Module, *_: Any) -> None:
        learner.looks_away = True

    def look(_module: nn.Module, *_: Any) -> None:
        learner.looks_away = False

    for path, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        prefix = f"{path}." if path else ""

        def tell(module: nn.Module, _args: Any, prefix: str = prefix) -> None:
            learner.looks_away = False
            for name, parameter in module.named_parameters():
                if not isinstance(parameter, DTensor):
                    learner.learn(canonical[prefix + name], parameter)

        # Around FSDP's own hooks, which gather before the block's forward pass and free after it.
        block: Any = module
        handles.append(block.register_forward_pre_hook(look_away, prepend=True))
        handles.append(block.register_forward_pre_hook(tell))
        handles.append(block.register_forward_hook(look_away, prepend=True))
        handles.append(block.register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reduced_to_shards(whole: Tensor, name: str, parameter: Tensor) -> DTensor:
    """Returns the sum of all ranks' tensors, spread as the parameter is; a collective call.

    Raises:
        UnsupportedOperationError: If the parameter is not spread over ranks.
    """
    if not isinstance(parameter, DTensor):
        raise UnsupportedOperationError(
            f"{name}: this trainable parameter is left out of FSDP2's sharding, so its sum has no rule. Freeze it, "
            "or remove it from ignored_modules."
        )
    mesh = parameter.device_mesh
    addends = DTensor.from_local(whole, mesh, [Partial()] * mesh.ndim, run_check=False)
    return addends.redistribute(mesh, parameter.placements)


def gradients_of_equal_losses(parameters: Mapping[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of a loss that all ranks share, by plain autograd and FSDP's own reduction.

    FSDP averages over ranks, which gives the gradient of one where all are equal.

    Raises:
        UnsupportedOperationError: If the ranks' losses differ.
    """
    value = torch.nan_to_num(loss.detach().float(), nan=-1.0)
    bounds = torch.stack([value, -value])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if not torch.equal(bounds[0], -bounds[1]):
        raise UnsupportedOperationError(
            "The ranks of a sharded model have different samples where all need the same one. Give certify the same "
            "micro-batch on every rank, and leave chance out of the loss."
        )
    kept = {name: p.grad for name, p in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}
    finally:
        for name, parameter in parameters.items():
            parameter.grad = kept[name]


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank; a collective call."""
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def local(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that is spread over ranks, this rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def squared_length(tensor: Tensor) -> Tensor:
    """Returns ‖tensor‖², never below the true one; of a tensor that is spread over ranks, that of all of it."""
    if isinstance(tensor, DTensor) and any(isinstance(p, Partial) for p in tensor.placements):
        tensor = tensor.full_tensor()
    square = squared_lengths(local(tensor).flatten()[None])[0]
    if not isinstance(tensor, DTensor):
        return square
    # Shards' squares add up; a replica has all of it.
    placements = [p if isinstance(p, Replicate) else Partial() for p in tensor.placements]
    return DTensor.from_local(square, tensor.device_mesh, placements).full_tensor()


def equal_on_replicas_(shard: DTensor) -> None:
    """Gives all replicas of a shard the values of the first one, in place; with hybrid sharding only."""
    mesh, values = shard.device_mesh, shard.to_local()
    for axis, placement in enumerate(shard.placements):
        if isinstance(placement, Replicate) and mesh.size(axis) > 1:
            group = mesh.get_group(axis)
            dist.broadcast(values, src=dist.get_global_rank(group, 0), group=group)


def is_first_replica(shard: DTensor) -> bool:
    """Whether this rank's part of the tensor is the one that its replicas copy."""
    coordinate = shard.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        place == 0
        for place, placement in zip(coordinate, shard.placements, strict=True)
        if isinstance(placement, Replicate)
    )
