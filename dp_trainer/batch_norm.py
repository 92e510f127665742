"""Batch normalization that keeps samples apart: with the statistics it came with.

In training, batch normalization couples the samples of a batch and stores their
statistics without noise, so no per-sample gradient exists. With its stored
statistics it is a fixed scale and shift for each channel, and exact.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from dp_trainer.errors import UnsupportedOperationError


class _Frozen(nn.modules.batchnorm._BatchNorm):
    """Stays in evaluation mode whatever the model is set to."""

    def train(self, mode: bool = True) -> Self:
        """Ignores ``mode``: the stored statistics are used, and never changed."""
        return super().train(False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalizes each channel by its stored statistics."""
        output = super().forward(input)
        if output.requires_grad:
            # torch 2.13's own backward on a CPU is wrong for some strides of the gradient of a single sample.
            output.register_hook(_contiguous)  # type: ignore[no-untyped-call]
        return output


def _contiguous(gradient: Tensor) -> Tensor:
    return gradient.contiguous()


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with its stored statistics."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with its stored statistics."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with its stored statistics."""


_FROZEN: dict[type[nn.Module], type[_Frozen]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
}


def freeze_batch_norm(model: nn.Module) -> int:
    """Makes every batch normalization use its stored statistics from here on, in place.

    Guarantee: these layers no longer couple samples and no longer store anything
    about them. Their scale and shift stay trainable, and the names of parameters
    and buffers stay the same. Sensible for pretrained models only: a new model's
    statistics are zero means and unit variances.

    Args:
        model: Any module.

    Returns:
        The number of layers changed.

    Raises:
        UnsupportedOperationError: For a kind of batch normalization that is not
            torch's own, or one without stored statistics.
    """
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, _Frozen)
    ]
    for path, module in layers:
        if type(module) not in _FROZEN or module.running_mean is None:
            raise UnsupportedOperationError(
                f"{path}: {type(module).__name__} is not torch's own batch normalization, or stores no statistics. "
                "Replace it by GroupNorm or LayerNorm."
            )
    for _, module in layers:
        module.__class__ = _FROZEN[type(module)]
        module.train()
    return len(layers)


def is_frozen(module: nn.Module) -> bool:
    """Whether the layer is a batch normalization that stays with its stored statistics."""
    return isinstance(module, _Frozen)
