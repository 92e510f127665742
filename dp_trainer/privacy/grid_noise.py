"""Noise that leaves nothing to read in its last digits, made by a cipher.

**The attack.** Floating-point numbers lie unevenly, and a sampler of finite words reaches
only some of them. Which ones a sum can become after noise then depends on the sum
itself. Somebody who guesses two candidates for it may find that the released digits can
come from one of them only, whatever ε says. Mironov 2012 showed it for Laplace noise, Jin
et al. 2022 for Gaussian samplers in use.

**The construction.** Sum and noise are both rounded to one grid, the same for all data:
multiples of a power of two about 2⁻³² of the noise's std. They are added there, exactly,
as whole numbers. Rounding a Gaussian after or before adding a whole number is the
same, so the result is a rounded sample of the ordinary Gaussian mechanism on the rounded sum,
and any later rounding, division by B among it, sees nothing else. Rounding the sum may
move each entry by half a cell for either dataset: ``added_sensitivity`` says how much that is.

The Gaussians themselves are sums of four independent ones, halved, each of two
53-bit numbers: so many words lead to each cell that none is left out within reach, and
finding them is no look-up any more.

What it does not stop: measuring how long a step takes, and reading the process's memory.

Source: Holohan & Braghin 2021 for sums of several Gaussians; Mironov 2012 for the grid.
"""

from __future__ import annotations

import math
import threading

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from dp_trainer.errors import ConfigurationError

_SUMMANDS = 4
_WORD_BITS = 53
_FINENESS = 32
# Whole numbers up to here are exact in float64, sums of two included.
_LARGEST = 2.0**52
# Values made at a time, so that their buffers stay in the cache.
_CHUNK = 2**14


def grid_spacing(std: float) -> float:
    """Width of the grid for noise of this std: a power of two in (2⁻³³, 2⁻³²] of it."""
    return 2.0 ** (math.floor(math.log2(std)) - _FINENESS)


def added_sensitivity(std: float, entries: int) -> float:
    """How much rounding to the grid may add to the sensitivity of a sum, in gradient units.

    Guarantee: holds for the grid of every std up to twice the given one.

    Args:
        std: Standard deviation of the noise on each entry.
        entries: Number of entries of the whole sum, over all parameters.
    """
    return 0.0 if std == 0.0 else 2.0 * grid_spacing(std) * math.sqrt(entries)


class GridNoise:
    """Adds Gaussian noise on a grid; AES-256 in counter mode makes its bits, on the CPU.

    Guarantee: see the module's text. No word of the keystream is used twice.

    Args:
        key: The secret, 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._zeros = bytes(8 * _CHUNK)
        self._stream = bytearray(8 * _CHUNK)
        self._bits = torch.frombuffer(self._stream, dtype=torch.int64)
        self._numbers = torch.empty(_CHUNK, dtype=torch.float64)
        self._gaussians = torch.empty(_CHUNK, dtype=torch.float64)
        # One thread at a time: two on the same buffers would give out the same noise twice.
        self._lock = threading.Lock()

    def add_to_(self, values: Tensor, std: float, divisor: float) -> None:
        """Turns a contiguous tensor of one axis into ``(values + noise) / divisor``, on any device.

        Raises:
            ConfigurationError: If a sum is so large beside the noise that the grid cannot hold it.
        """
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK]
            with self._lock:
                self._add_chunk_(chunk, std, divisor)

    def _add_chunk_(self, values: Tensor, std: float, divisor: float) -> None:
        spacing = grid_spacing(std)
        # A power of two: exact.
        cells = values.to(device="cpu", dtype=torch.float64) / spacing
        if not float(cells.abs().max()) <= _LARGEST:
            raise ConfigurationError(
                f"secure_noise: a sum of up to {float(values.abs().max()):.3g} does not fit the grid of noise with std "
                f"{std:.3g}, beside which it is enormous. Raise noise_multiplier, or set secure_noise to false."
            )
        noise = self._draw(len(values)).mul_(std / spacing).round_()
        values.copy_(cells.round_().add_(noise).mul_(spacing).div_(divisor))

    def _draw(self, count: int) -> Tensor:
        """Returns fresh standard Gaussians in a buffer of its own, until the next call."""
        half = (count + 1) // 2
        total = self._gaussians[: 2 * half].zero_()
        for _ in range(_SUMMANDS):
            self._cipher.update_into(self._zeros[: 16 * half], self._stream)
            # The sign travels along: numbers in [-2⁵², 2⁵²).
            bits = self._bits[: 2 * half].bitwise_right_shift_(64 - _WORD_BITS)
            bits[:half].bitwise_and_(2**_WORD_BITS - 1)
            numbers = self._numbers[: 2 * half].copy_(bits)
            # In [2⁻⁵³, 1], so the logarithm is finite.
            radius = numbers[:half].add_(1).mul_(2.0**-_WORD_BITS).log_().mul_(-2).sqrt_()
            angle = numbers[half:].mul_(math.pi * 2.0 ** (1 - _WORD_BITS))
            total[:half].addcmul_(angle.cos(), radius)
            total[half:].addcmul_(angle.sin_(), radius)
        return total.mul_(1.0 / math.sqrt(_SUMMANDS))[:count]
