"""Gaussian noise from a generator of its own, keyed by the operating system.

The guarantee is worth what the noise's secrecy is worth. Noise from torch's
global generator is fixed by ``set_seed`` and its next values lie in every
checkpoint. Here nothing is shared, stored or printed.

On the CPU torch's generator keeps only 32 bits of its seed, few enough to try
them all, and its state follows from what it has put out: a parameter that no
sample uses shows pure noise. So there the bits are a cipher's keystream, AES-256
in counter mode, and the Box-Muller transform makes them Gaussian; that is also
faster than numpy's generators. On other devices torch's generator is a Philox
with a 64-bit key. Neither defends against attacks on the floating-point grid of the noise.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import NoReturn

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.sampling import insecure_key, refuse_to_store

_DEVICE_KEY_BITS = 64
_CIPHER_KEY_BITS = 256
# Values made at a time: their buffers stay in the cache.
_CHUNK = 2**16


class _Keystream:
    """Standard Gaussian numbers from AES-256 in counter mode, on the CPU.

    Each pair takes two 31-bit numbers of the keystream, so values reach to ±6.6;
    beyond lies a probability of 5e-11.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._zeros = bytes(4 * _CHUNK)

    def fill_(self, values: Tensor) -> None:
        """Overwrites a contiguous float32 tensor of one axis with fresh numbers."""
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK]
            count = len(chunk)
            half = (count + 1) // 2
            # A fresh buffer each time, since the tensors below share its memory.
            stream = bytearray(self._cipher.update(self._zeros[: 8 * half]))
            bits = torch.frombuffer(stream, dtype=torch.int32).bitwise_and_(2**31 - 1).float()
            radius = bits[:half].add_(1).mul_(2.0**-31).clamp_(max=1).log_().mul_(-2).sqrt_()
            angle = bits[half:].mul_(2 * math.pi * 2.0**-31)
            chunk[:half] = angle.cos().mul_(radius)
            chunk[half:] = angle.sin_().mul_(radius)[: count - half]


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

    Raises:
        ConfigurationError: On a std that is not finite or is negative, a tensor in
            half precision, or an attempt to serialize.
    """

    def __init__(self, *, device: torch.device | str, insecure_seed: int | None = None) -> None:
        self.device = torch.device(device)
        self._secure = insecure_seed is None
        # A fixed seed fills the key's lower half only.
        number = (
            secrets.randbits(_CIPHER_KEY_BITS)
            if insecure_seed is None
            else insecure_key(insecure_seed).reveal()
        )
        self._keystream: _Keystream | None = None
        self._torch: torch.Generator | None = None
        if self.device.type == "cpu":
            self._keystream = _Keystream(number.to_bytes(_CIPHER_KEY_BITS // 8, "big"))
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
        return f"{source}, key from the operating system's entropy, float32 Gaussian"

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
        values = torch.empty(tuple(shape), dtype=torch.float32, device=self.device)
        self._fill_(values.view(-1))
        return values.mul_(std)

    def add_noise_(self, tensor: Tensor, std: float) -> Tensor:
        """Adds fresh noise in place and returns the tensor.

        Args:
            tensor: A float32 or float64 sum on ``device``; noise added in half precision would be rounded away.
            std: Standard deviation of each entry, in the tensor's units. 0 changes nothing.

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
            return tensor
        if not tensor.is_contiguous():
            return tensor.add_(self.gaussian(tensor.shape, std))
        flat = tensor.view(-1)
        size = _CHUNK if self._keystream is not None else max(1, len(flat))
        noise = torch.empty(min(size, len(flat)), dtype=torch.float32, device=self.device)
        for start in range(0, len(flat), size):
            part = flat[start : start + size]
            self._fill_(noise[: len(part)])
            part.add_(noise[: len(part)], alpha=std)
        return tensor

    def _fill_(self, values: Tensor) -> None:
        if self._keystream is not None:
            self._keystream.fill_(values)
        else:
            values.normal_(generator=self._torch)

    def __repr__(self) -> str:
        return f"NoiseGenerator(device='{self.device}', is_secure={self._secure})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_store("NoiseGenerator")


def _check_std(std: float) -> None:
    if not math.isfinite(std) or not 0.0 <= std <= torch.finfo(torch.float32).max / 64.0:
        raise ConfigurationError(
            f"NoiseGenerator: std is {std!r}. It must be finite and not negative: noise_multiplier times sensitivity."
        )
