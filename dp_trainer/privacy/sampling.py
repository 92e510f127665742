"""Which samples enter each logical batch, drawn with a secret key.

The privacy accounting assumes that every sample enters every logical batch
independently with one known probability, and that nobody else can predict the
draws. So the draws come from their own generator, keyed by the operating
system, never from a global one that ``set_seed`` would fix and a checkpoint
would store.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np

from dp_trainer.errors import ConfigurationError

# Shuffling has an accounting of its own (mechanism.py), but no sampler: see docs/accounting.md.
SAMPLINGS = ("poisson", "full_batch")
KEY_BITS = 128


class SecretKey:
    """128 secret bits that never show: not printed, not pickled, not copied into a checkpoint.

    Guarantee: ``repr`` is constant, and pickling or copying raises. Use ``fresh_key``
    for a key from the operating system; ``insecure_key`` gives a fixed one for tests.

    Args:
        number: The key, in [0, 2**128).
        secure: Whether it came from the operating system's entropy.

    Raises:
        ConfigurationError: If the number does not fit 128 bits, or on any attempt to serialize.
    """

    __slots__ = ("_number", "secure")

    def __init__(self, number: int, *, secure: bool) -> None:
        if not 0 <= number < 2**KEY_BITS:
            raise ConfigurationError(f"A key has {KEY_BITS} bits; use fresh_key() or insecure_key(seed).")
        self._number = number
        self.secure = secure

    def reveal(self) -> int:
        """The key itself, for keying a generator or sending it to another rank of the same run."""
        return self._number

    def __repr__(self) -> str:
        return "SecretKey(hidden)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_store("SecretKey")


def refuse_to_store(name: str) -> NoReturn:
    """Raises for an attempt to pickle or copy a secret.

    Raises:
        ConfigurationError: Always.
    """
    raise ConfigurationError(
        f"{name}: pickling or copying it would let its randomness be replayed or predicted. "
        "Keep it out of checkpoints and worker processes; a resumed run draws a fresh key."
    )


def fresh_key() -> SecretKey:
    """Returns a key from the operating system's entropy source."""
    return SecretKey(secrets.randbits(KEY_BITS), secure=True)


def insecure_key(seed: int) -> SecretKey:
    """Returns the same key for the same seed: for tests and debugging, never for a private run."""
    digest = hashlib.sha256(f"insecure key {int(seed)}".encode()).digest()
    return SecretKey(int.from_bytes(digest[: KEY_BITS // 8], "big"), secure=False)


class PoissonSampler:
    """Draws each logical batch by an independent coin per sample, then caps its size.

    Guarantee: sample i enters a draw with probability ``sampling_probability``,
    independently of the other samples, of earlier draws and of every global seed
    (to within 2**-53). If more than ``batch_cap`` come up, a uniformly random
    subset of that size is kept; the accounting knows about the cap. A draw is
    never repeated: the generator moves on with each draw, so leaving a loop early
    or starting a new one continues the stream.

    It is a batch sampler: iterating yields ``steps`` lists of indices, any of
    which may be empty. Pass it to a ``DataLoader`` as ``batch_sampler``.

    Args:
        dataset_size: Number of samples at hand.
        sampling_probability: The coin's probability, in (0, 1].
        batch_cap: Largest size of a logical batch; at or above ``dataset_size`` it never acts on these.
        steps: Draws of one iteration (an epoch of the Trainer).
        key: The secret; the same key gives the same draws, so each run needs a fresh one.

    Raises:
        ConfigurationError: If an argument is out of range.

    Source: Poisson sampling as in Abadi et al. 2016; the cap as in arXiv 2508.15089.
    """

    def __init__(
        self, *, dataset_size: int, sampling_probability: float, batch_cap: int, steps: int, key: SecretKey
    ) -> None:
        _check_counts("PoissonSampler", dataset_size=dataset_size, batch_cap=batch_cap, steps=steps)
        if not (math.isfinite(sampling_probability) and 0.0 < sampling_probability <= 1.0):
            raise ConfigurationError(
                f"PoissonSampler: sampling_probability is {sampling_probability!r}. "
                "It must be in (0, 1]: the expected batch size over the dataset size."
            )
        self.dataset_size = dataset_size
        self.sampling_probability = sampling_probability
        self.batch_cap = batch_cap
        self.steps = steps
        self._generator = np.random.Generator(np.random.Philox(key=key.reveal()))

    def draw(self) -> list[int]:
        """Returns the sorted indices of one new logical batch."""
        chosen = np.flatnonzero(self._generator.random(self.dataset_size) < self.sampling_probability)
        if len(chosen) > self.batch_cap:
            chosen = np.sort(
                self._generator.choice(chosen, size=self.batch_cap, replace=False, shuffle=False)
            )
        return [int(index) for index in chosen]

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield self.draw()

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:
        return (
            f"PoissonSampler(dataset_size={self.dataset_size}, sampling_probability={self.sampling_probability}, "
            f"batch_cap={self.batch_cap}, steps={self.steps})"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_store("PoissonSampler")


class FullBatchSampler:
    """Yields every sample at every step.

    Guarantee: no randomness, hence no amplification by sampling to account for.

    Args:
        dataset_size: Number of samples at hand.
        steps: Draws of one iteration.

    Raises:
        ConfigurationError: If an argument is out of range.
    """

    def __init__(self, *, dataset_size: int, steps: int) -> None:
        _check_counts("FullBatchSampler", dataset_size=dataset_size, steps=steps)
        self.dataset_size = dataset_size
        self.steps = steps

    def draw(self) -> list[int]:
        """Returns all indices."""
        return list(range(self.dataset_size))

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield self.draw()

    def __len__(self) -> int:
        return self.steps


def rank_slice(indices: Sequence[int], rank: int, world_size: int) -> list[int]:
    """One rank's share of a global draw.

    Guarantee: the shares of all ranks are disjoint and together the whole draw;
    sizes differ by at most one. All ranks must slice the same draw, made with the
    same key: separate draws over shards would not be one Poisson draw.

    Args:
        indices: The global draw.
        rank: This rank, in [0, world_size).
        world_size: Number of ranks.

    Raises:
        ConfigurationError: If the rank is not one of them.
    """
    if not 0 <= rank < world_size:
        raise ConfigurationError(f"rank_slice: rank {rank} is not in [0, {world_size}).")
    return list(indices[rank::world_size])


def _check_counts(place: str, **counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{place}: {name} is {value!r}. It must be a positive whole number.")


def steps_per_epoch(rows: int, drawn: int) -> int:
    """Returns how many logical batches show each sample about once, rounded up as in ``Trainer``."""
    return max(1, math.ceil(rows / drawn))
