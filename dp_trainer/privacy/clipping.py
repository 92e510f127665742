"""Clipping functions: from per-sample gradient norms to clip factors.

Axes: B sample, G group of parameters (one norm a group; plain clipping has none).

Every function here keeps the same promise, checked by one contract test over
``CLIPPING_FUNCTIONS``: multiplying each sample's gradient by its factor bounds
the L2 norm of what that sample contributes to the sum by ``sensitivity``.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_trainer.errors import ConfigurationError

# Squares of gradient entries below 1e-19 vanish in float32, so a norm of that order may hide a larger
# true one. Even a billion such entries have a norm of 3e-15 only, which is nothing beside this size.
SMALLEST_TRUSTED = 1e-12
LARGEST_TRUSTED = 1e12


class ClippingFunction(ABC):
    """Maps norms to clip factors and owns the sensitivity that follows.

    Guarantee: for every finite norm, ``factor * norm <= sensitivity``; a sample
    with a NaN or infinite norm gets a factor of exactly 0 in all its groups. The
    bound survives rounding: factors are shrunk by two units in the last place,
    and set to 0 where they would be subnormal, so the product never rounds above
    the bound by more than its own last place.

    Args:
        clipping_norm: The bound R on a sample's contribution, in gradient units.

    Raises:
        ConfigurationError: If a setting is not a number in [1e-12, 1e12].
    """

    clipping_norm: float

    def __post_init__(self) -> None:
        for name, value in _settings(self).items():
            usable = isinstance(value, int | float) and not isinstance(value, bool)
            if not (usable and math.isfinite(value) and SMALLEST_TRUSTED <= value <= LARGEST_TRUSTED):
                raise ConfigurationError(
                    f"{type(self).__name__}.{name} is {value!r}. It must be a number between "
                    f"{SMALLEST_TRUSTED:g} and {LARGEST_TRUSTED:g}; beyond these float32 norms lose their meaning."
                )

    @property
    def sensitivity(self) -> float:
        """Largest L2 change of the clipped sum when one sample is added or removed."""
        return float(self.clipping_norm)

    def __call__(self, norms: Tensor) -> Tensor:
        """Returns one clip factor for each norm.

        Args:
            norms: L2 norms, shape (B,), or (B, G) for G parameter groups; float32 or float64.

        Returns:
            Factors of the same shape, dtype and device. With groups each one is clipped to
            ``R / sqrt(G)`` (and any other threshold divided alike), so that the sensitivity stays R.

        Raises:
            ConfigurationError: For another dtype or shape: norms in half precision
                underflow to 0, which would leave the gradients unclipped.
        """
        if norms.dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(
                f"{type(self).__name__}: norms are {norms.dtype}, which underflows. Accumulate norms in float32."
            )
        if norms.dim() not in (1, 2):
            raise ConfigurationError(
                f"{type(self).__name__}: norms have shape {tuple(norms.shape)}; give (B,) or (B, G)."
            )
        shrink = 1.0 / math.sqrt(max(norms.shape[1], 1)) if norms.dim() == 2 else 1.0
        usable = torch.isfinite(norms) & (norms >= 0)
        if norms.dim() == 2:
            # One broken group says that this sample's backward went wrong: leave the sample out.
            usable = usable.all(dim=1, keepdim=True).expand_as(norms)
        numbers = torch.finfo(norms.dtype)
        factors = self._factors(torch.where(usable, norms, 0.0), shrink).clamp(max=numbers.max)
        # Division and product round by half a unit each; two whole units keep the product under R.
        # A factor of exactly 1 stays: it multiplies without rounding.
        shrunk = torch.where(factors == 1.0, factors, factors * (1.0 - 2.0 * numbers.eps))
        return torch.where(usable & (shrunk >= numbers.tiny), shrunk, 0.0)

    @abstractmethod
    def _factors(self, norms: Tensor, shrink: float) -> Tensor:
        """Factors of finite, non-negative norms; thresholds are multiplied by ``shrink``."""

    def describe(self) -> dict[str, float | str]:
        """Name and settings, for the plan, the privacy statement and checkpoint comparison."""
        name = next(name for name, kind in CLIPPING_FUNCTIONS.items() if kind is type(self))
        return {"name": name, **{setting: float(value) for setting, value in _settings(self).items()}}


def _settings(clip: ClippingFunction) -> dict[str, float]:
    assert dataclasses.is_dataclass(clip)
    return {field.name: getattr(clip, field.name) for field in dataclasses.fields(clip)}


@dataclass(frozen=True)
class AutomaticClipping(ClippingFunction):
    """R / (‖g‖ + γ): every sample counts about equally, tiny ones fade out.

    Guarantee: each contribution is shorter than R; sensitivity R.

    Args:
        gamma: Stability constant γ, in gradient units; what is much shorter fades to 0.
        clipping_norm: The bound R. It only rescales the learning rate, hence the default 1.

    Source: AUTO-S of Bu et al. 2022, "Automatic Clipping" (arXiv 2206.07136).
    """

    gamma: float = 0.01
    clipping_norm: float = 1.0

    def _factors(self, norms: Tensor, shrink: float) -> Tensor:
        return (self.clipping_norm * shrink) / (norms + self.gamma)


@dataclass(frozen=True)
class NormalizingClipping(ClippingFunction):
    """R / ‖g‖: every sample counts exactly R.

    Guarantee: each contribution has length R, or 0 where the norm is below 1e-12,
    since such a norm is not known well enough to divide by; sensitivity R.

    Args:
        clipping_norm: The bound R.

    Source: AUTO-V of Bu et al. 2022 (arXiv 2206.07136).
    """

    clipping_norm: float = 1.0

    def _factors(self, norms: Tensor, shrink: float) -> Tensor:
        known = norms >= SMALLEST_TRUSTED
        return torch.where(known, (self.clipping_norm * shrink) / norms.clamp(min=SMALLEST_TRUSTED), 0.0)


@dataclass(frozen=True)
class FlatClipping(ClippingFunction):
    """min(1, R / ‖g‖): only gradients longer than R are shortened.

    Guarantee: each contribution is at most R long; sensitivity R.

    Args:
        clipping_norm: The bound R, in gradient units; depends on model and loss, so no default.

    Source: Abadi et al. 2016, Algorithm 1 (arXiv 1607.00133).
    """

    clipping_norm: float

    def _factors(self, norms: Tensor, shrink: float) -> Tensor:
        bound = self.clipping_norm * shrink
        # Clamping the norm, not the quotient, keeps tiny norms from overflowing.
        return bound / norms.clamp(min=bound)


@dataclass(frozen=True)
class GlobalClipping(ClippingFunction):
    """(R / Z) · [‖g‖ ≤ Z]: one common factor; gradients longer than Z are dropped.

    Guarantee: each contribution is at most R long; sensitivity R. Directions of
    the kept gradients' sum are unchanged by clipping.

    Args:
        clipping_norm: The bound R.
        cutoff: The norm Z beyond which a sample is dropped.

    Source: Bu et al. 2021 (arXiv 2106.07830).
    """

    clipping_norm: float
    cutoff: float

    def _factors(self, norms: Tensor, shrink: float) -> Tensor:
        kept = norms <= self.cutoff * shrink
        return torch.where(kept, torch.full_like(norms, self.clipping_norm / self.cutoff), 0.0)


CLIPPING_FUNCTIONS: Mapping[str, type[ClippingFunction]] = {
    "automatic": AutomaticClipping,
    "normalizing": NormalizingClipping,
    "flat": FlatClipping,
    "global": GlobalClipping,
}
