"""Gaussian noise from a generator of its own, keyed by the operating system.

The guarantee is worth what the noise's secrecy is worth. Noise from torch's
global generator is fixed by ``set_seed`` and its next values lie in every
checkpoint. Here nothing is shared, stored or printed.

On the CPU torch's generator keeps only 32 bits of its seed, few enough to try
them all, and its state follows from what it has put out: a parameter that no
sample uses shows pure noise. So there the bits are a cipher's keystream, AES-256
in counter mode, and the Box-Muller transform makes them Gaussian; that is also
faster than numpy's generators. On other devices torch's generator is a Philox
with a 64-bit key. Neither defends against attacks on the floating-point grid of the noise:
``grid_noise`` does, more slowly, on request.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.grid_noise import GridNoise, added_sensitivity
from dp_trainer.privacy.sampling import insecure_key, refuse_to_store

# Built from box_muller.c with the package, where a compiler was at hand; without it the same numbers take longer.
_built: ModuleType | None
try:
    from dp_trainer.privacy import _box_muller as _built
except ImportError:
    _built = None

_DEVICE_KEY_BITS = 64
_CIPHER_KEY_BITS = 256
# Values made at a time: their buffers stay in the cache, and the calls on them cost little.
_CHUNK = 2**17
# The kernel runs on one thread, torch's operations on all; beyond so many they are as fast.
_KERNEL_THREADS = 6


def _checked(kernel: ModuleType | None) -> ModuleType | None:
    """The kernel if it gives what it should: one left over from another version may take its arguments otherwise."""
    words, count = torch.arange(-6, 6, dtype=torch.int32) * 357913941, 11
    values = torch.ones(count)
    try:
        if kernel is not None:
            kernel.add(values.data_ptr(), words.data_ptr(), count, 2.0, 4.0)
    except (TypeError, ValueError):
        return None
    radii, angles = (
        words[:6].bitwise_and(2**31 - 1).double().add(1) / 2**31,
        words[6:].double() * math.pi / 2**31,
    )
    radii = (-2 * radii.log()).sqrt()
    exact = torch.cat((radii * angles.cos(), radii * angles.sin()))[:count] * 2 + 1
    return kernel if torch.allclose(values.double(), exact / 4, atol=1e-5) else None


_kernel = _checked(_built)


class _Keystream:
    """Gaussian numbers from AES-256 in counter mode, on the CPU.

    Each pair takes two 31-bit numbers of the keystream, so values reach to ±6.6
    standard deviations; beyond lies a probability of 5e-11.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._zeros = memoryview(bytes(4 * _CHUNK))
        # Made once: fresh buffers of this size would be paged in anew at every chunk.
        self._stream = bytearray(4 * _CHUNK)
        self._bits = torch.frombuffer(self._stream, dtype=torch.int32)
        self._numbers = torch.empty(_CHUNK, dtype=torch.float32)
        self._cosines = torch.empty(_CHUNK // 2, dtype=torch.float32)
        # One thread at a time: two on the same buffers would give out the same noise twice.
        self._lock = threading.Lock()

    def add_to_(self, values: Tensor, std: float, divisor: float) -> None:
        """Adds fresh noise to a contiguous floating-point tensor of one axis, then divides."""
        kernel = _kernel if torch.get_num_threads() <= _KERNEL_THREADS and _has_plain_memory(values) else None
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK]
            with self._lock:
                # Pairs: an odd count takes one word more.
                self._cipher.update_into(self._zeros[: 4 * (len(chunk) + len(chunk) % 2)], self._stream)
                if kernel:
                    kernel.add(chunk.data_ptr(), self._bits.data_ptr(), len(chunk), std, divisor)
                else:
                    self._add_chunk_(chunk, std)
            # Here, where the chunk is in the cache.
            if divisor != 1 and not kernel:
                chunk.div_(divisor)
        if kernel:
            # As torch's own operations in place do.
            torch.autograd.graph.increment_version(values)

    def _add_chunk_(self, values: Tensor, std: float) -> None:
        """Adds noise from the keystream to at most ``_CHUNK`` values by the Box-Muller transform."""
        half = (len(values) + 1) // 2
        bits, numbers = self._bits[: 2 * half], self._numbers[: 2 * half]
        # The radius takes 31 bits without the sign, the angle takes the sign too.
        bits[:half].bitwise_and_(2**31 - 1)
        numbers.copy_(bits)
        # Rounding included, this lies in [2⁻³¹, 1], so the logarithm is finite.
        radius = numbers[:half].add_(1).mul_(2.0**-31).log_().mul_(-2).sqrt_()
        angle = numbers[half:].mul_(math.pi * 2.0**-31)
        cosine = torch.cos(angle, out=self._cosines[:half])
        values[:half].addcmul_(cosine, radius, value=std)
        rest = len(values) - half
        values[half:].addcmul_(angle.sin_()[:rest], radius[:rest], value=std)


def _has_plain_memory(values: Tensor) -> bool:
    """Whether the tensor is nothing but float32 numbers in this process's memory."""
    is_plain = type(values) is Tensor and values.dtype == torch.float32 and values.device.type == "cpu"
    return is_plain and not values.requires_grad and not values.is_neg() and values.data_ptr() != 0


class NoiseGenerator:
    """Draws independent Gaussian noise; each value is used once and never again.

    Guarantee: entries are independent N(0, std²) in float32, independent across
    calls, and neither influenced by nor visible in any global generator. The key
    is drawn here, from the operating system; the object cannot be pickled or
    copied, so no checkpoint can hold it, and its ``repr`` does not show it.

    Args:
        device: Where the noise is made.
        insecure_seed: A fixed key, for tests and debugging: anyone who knows it can
            subtract the noise. None, the default, draws a secret key.
        on_grid: Whether the noise must also withstand a look at its last digits; a cipher makes it
            then on every device. See ``grid_noise``.

    Raises:
        ConfigurationError: On a std that is not finite or is negative, a tensor in
            half precision, or an attempt to serialize.
    """

    def __init__(
        self, *, device: torch.device | str, insecure_seed: int | None = None, on_grid: bool = False
    ) -> None:
        self.device = torch.device(device)
        self._secure = insecure_seed is None
        self._process = os.getpid()
        # A fixed seed fills the key's lower half only.
        number = (
            secrets.randbits(_CIPHER_KEY_BITS)
            if insecure_seed is None
            else insecure_key(insecure_seed).reveal()
        )
        self._keystream: _Keystream | GridNoise | None = None
        self._torch: torch.Generator | None = None
        if on_grid or self.device.type == "cpu":
            kind = GridNoise if on_grid else _Keystream
            self._keystream = kind(number.to_bytes(_CIPHER_KEY_BITS // 8, "big"))
        else:
            self._torch = torch.Generator(device=self.device)
            self._torch.manual_seed(number % 2**_DEVICE_KEY_BITS)

    @property
    def is_secure(self) -> bool:
        """Whether the key is secret: drawn from the operating system's entropy."""
        return self._secure

    def describe(self) -> str:
        """How the noise is made, for the privacy statement; never the key."""
        if not self._secure:
            return "INSECURE: fixed seed; anyone who knows it can subtract the noise"
        source = (
            f"AES-{_CIPHER_KEY_BITS} in counter mode"
            if self._keystream
            else f"Philox with {_DEVICE_KEY_BITS} bits"
        )
        shape = "float32 Gaussian"
        if isinstance(self._keystream, GridNoise):
            shape = "sum of four float64 Gaussians, added to the sum on a common grid"
        return f"{source}, key from the operating system's entropy, {shape}"

    def added_sensitivity(self, std: float, entries: int) -> float:
        """What the noise's grid adds to the sensitivity of a sum of so many entries; 0 without a grid.

        Args:
            std: Standard deviation of the noise, which may be up to doubled to cover the result.
            entries: Number of entries of the whole sum.
        """
        return added_sensitivity(std, entries) if isinstance(self._keystream, GridNoise) else 0.0

    def gaussian(self, shape: Sequence[int], std: float) -> Tensor:
        """Returns fresh noise.

        Args:
            shape: Shape of the result.
            std: Standard deviation of each entry. 0 gives zeros and draws nothing.

        Returns:
            A float32 tensor on ``device``.

        Raises:
            ConfigurationError: If ``std`` is negative, not finite, or beyond float32.
        """
        _check_std(std)
        if std == 0.0:
            return torch.zeros(tuple(shape), dtype=torch.float32, device=self.device)
        values = torch.zeros(tuple(shape), dtype=torch.float32, device=self.device)
        self._add_to_(values.view(-1), std, 1)
        return values

    def add_noise_(self, tensor: Tensor, std: float, *, divisor: float = 1) -> Tensor:
        """Turns a sum into ``(sum + noise) / divisor`` in place, in one pass, and returns the tensor.

        Args:
            tensor: A float32 or float64 sum on ``device``; noise added in half precision would be rounded away.
            std: Standard deviation of each entry, in the tensor's units. 0 adds nothing.
            divisor: A public constant.

        Raises:
            ConfigurationError: If the tensor's dtype or device differ, or ``std`` is not usable.
        """
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.device.type != self.device.type:
            raise ConfigurationError(
                f"NoiseGenerator on {self.device}: the tensor is {tensor.dtype} on {tensor.device}. "
                "Accumulate the clipped sum in float32 on the generator's device."
            )
        _check_std(std)
        if std == 0.0:
            return tensor if divisor == 1 else tensor.div_(divisor)
        if not tensor.is_contiguous():
            return tensor.copy_(self.add_noise_(tensor.contiguous(), std, divisor=divisor))
        self._add_to_(tensor.view(-1), std, divisor)
        return tensor

    def _refuse_a_forked_copy(self) -> None:
        if os.getpid() != self._process:
            raise ConfigurationError(
                "NoiseGenerator: it was made before this process was forked, so parent and child would draw the "
                "same noise. Make one in each process."
            )

    def _add_to_(self, values: Tensor, std: float, divisor: float) -> None:
        self._refuse_a_forked_copy()
        if self._keystream is not None:
            self._keystream.add_to_(values, std, divisor)
        else:
            noise = torch.empty(values.shape, dtype=torch.float32, device=self.device)
            values.add_(noise.normal_(generator=self._torch), alpha=std).div_(divisor)

    def __repr__(self) -> str:
        return f"NoiseGenerator(device='{self.device}', is_secure={self._secure})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_store("NoiseGenerator")


def _check_std(std: float) -> None:
    if not math.isfinite(std) or not 0.0 <= std <= torch.finfo(torch.float32).max / 64.0:
        raise ConfigurationError(
            f"NoiseGenerator: std is {std!r}. It must be finite and not negative: noise_multiplier times sensitivity."
        )
