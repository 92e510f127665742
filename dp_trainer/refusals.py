"""What a Trainer can be set to do that has no private form here, or only one: a row each.

Each row of refusals says when it applies and why it is refused, with the way out. Everything
else of ``TrainingArguments`` is post-processing of the privatized gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import TrainingArguments
from transformers.utils import logging

from dp_trainer.batch_norm import is_frozen
from dp_trainer.errors import UnsupportedOperationError

logger = logging.get_logger(__name__)

_FIXED_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "gradient_accumulation_steps": (1, "one logical batch is one step; micro-batches are cut inside it"),
    "max_grad_norm": (0.0, "each sample is clipped already; clipping the sum would shrink signal, not noise"),
    "average_tokens_across_devices": (False, "each sample's loss is averaged over its own tokens"),
    "enable_jit_checkpoint": (False, "SIGTERM saves a checkpoint anyway, and never in the middle of a step"),
}
_STEPPING_IN_BACKWARD = ("lomo", "adalomo")


@dataclass(frozen=True)
class Refusal:
    """A setting, when it applies, and what to do instead."""

    setting: str
    applies: Callable[[TrainingArguments], bool]
    reason: str


def _optimizer(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


ARGUMENT_REFUSALS = (
    Refusal(
        "fp16",
        lambda a: bool(a.fp16),
        "its loss scaling overflows and underflows per-sample norms, which then clip nothing. Use bf16=True, "
        "or train in float32",
    ),
    Refusal(
        "n_gpu > 1 in one process",
        lambda a: a.n_gpu > 1,
        "DataParallel replicates the model where no capture sees it. Set CUDA_VISIBLE_DEVICES to one device",
    ),
    Refusal(
        "optim",
        lambda a: _optimizer(a) in _STEPPING_IN_BACKWARD or "layerwise" in _optimizer(a),
        "it steps inside the backward pass, before noise is added. Use another optimizer, such as adamw_torch",
    ),
    Refusal(
        "train_sampling_strategy / group_by_length",
        lambda a: (
            getattr(a, "train_sampling_strategy", "random") != "random"
            or bool(getattr(a, "group_by_length", False))
        ),
        "batches must be Poisson draws for the accounting to hold. Remove it: drawn samples are sorted by length "
        "inside each logical batch anyway",
    ),
    Refusal(
        "auto_find_batch_size",
        lambda a: bool(a.auto_find_batch_size),
        "its retry resets the step counter but keeps trained weights, and so forgets spent privacy. Lower "
        "per_device_train_batch_size and raise gradient_accumulation_steps by the same factor",
    ),
    Refusal(
        "use_liger_kernel",
        lambda a: bool(a.use_liger_kernel),
        "its kernels fuse parameters away from the capture. Set it to False",
    ),
    Refusal(
        "torch_compile",
        lambda a: bool(a.torch_compile),
        "compiled graphs bypass the capture of per-sample gradients. Set it to False",
    ),
    Refusal(
        "neftune_noise_alpha",
        lambda a: a.neftune_noise_alpha is not None,
        "its noise is scaled by the padded length of the micro-batch, which couples samples. Remove it",
    ),
    Refusal(
        "deepspeed",
        lambda a: bool(a.deepspeed),
        "its engine reduces and steps before noise is added. Use FSDP2 (fsdp_version: 2), which shards as ZeRO-3 "
        "does",
    ),
    Refusal(
        "parallelism_config",
        lambda a: getattr(a, "parallelism_config", None) is not None,
        "tensor, context and sequence parallelism split samples or parameters between ranks. Remove it",
    ),
)


def refuse_unsupported_arguments(args: TrainingArguments) -> None:
    """Raises for the first setting in the table that applies.

    Raises:
        UnsupportedOperationError: Naming the setting, the reason and the way out.
    """
    for refusal in ARGUMENT_REFUSALS:
        if refusal.applies(args):
            raise UnsupportedOperationError(f"TrainingArguments: {refusal.setting}: {refusal.reason}.")


def refuse_unsupported_backend(accelerator: Any) -> None:
    """Raises for ways of running several processes that have no private form here.

    Raises:
        UnsupportedOperationError: Naming the way, the reason and what to use instead.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if kind == "FSDP" and getattr(plugin, "fsdp_version", 1) != 2:
        raise UnsupportedOperationError(
            "FSDP 1 flattens parameters together, so that no per-sample gradient can be told apart. Set "
            "fsdp_version: 2."
        )
    if kind == "FSDP" and isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy):
        raise UnsupportedOperationError(
            "FSDP with parameters offloaded to the CPU: noised sums lie on the device. Set "
            "fsdp_offload_params: false."
        )
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise UnsupportedOperationError(
            f"Training with {kind} is not supported: it reduces gradients, or steps, where no noise has been added. "
            "Use plain data parallelism (MULTI_GPU) or FSDP2."
        )


def refuse_unsupported_modules(model: nn.Module) -> None:
    """Raises for layers that couple samples by design.

    Raises:
        UnsupportedOperationError: For batch normalization, naming the layer.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not is_frozen(module):
            raise UnsupportedOperationError(
                f"{path}: {type(module).__name__} normalizes each sample by its neighbours and stores their "
                "statistics without noise. Call dp_trainer.freeze_batch_norm(model) to train with the statistics "
                "it has, or replace it by GroupNorm or LayerNorm."
            )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise UnsupportedOperationError(
            "The model is compiled; compiled graphs bypass the capture. Pass the model without torch.compile."
        )


def refuse_foreign_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises if the optimizer would step something whose gradient is not privatized.

    Raises:
        UnsupportedOperationError: For a trainable tensor that is not a parameter of the model.
    """
    known = {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in known and parameter.requires_grad:
                raise UnsupportedOperationError(
                    f"The optimizer holds a tensor of shape {tuple(parameter.shape)} that is no parameter of the "
                    "model, so its gradient would get neither clipping nor noise. Register it in the model."
                )


def refuse_unsupported_optimizer(optimizer: Any) -> None:
    """Raises for optimizers that evaluate the loss again or expect sparse gradients.

    Raises:
        UnsupportedOperationError: Naming the optimizer.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, torch.optim.LBFGS | torch.optim.SparseAdam):
        raise UnsupportedOperationError(
            f"{type(inner).__name__}: it evaluates the loss again or needs sparse gradients, outside the private "
            "release. Use a first-order optimizer such as AdamW or SGD."
        )


def with_fixed_arguments(args: TrainingArguments) -> TrainingArguments:
    """A copy of the arguments with what the mechanism fixes; each change is logged once."""
    fixed = copy.copy(args)
    for name, (value, reason) in _FIXED_ARGUMENTS.items():
        if getattr(fixed, name) != value:
            logger.warning(f"TrainingArguments.{name}: {getattr(fixed, name)} → {value}: {reason}.")
            setattr(fixed, name, value)
    return fixed
