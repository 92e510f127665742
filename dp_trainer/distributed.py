"""One release made by several processes: who draws, who adds, who puts in noise.

Guarantee: what ``Ranks`` makes of the ranks' clipped sums is one release, as one
process would make it: the sum over all ranks, noise of the stated std once on
each entry, independent between entries, and the same result on every rank that
holds the same entry. The draw of each logical batch is one Poisson draw, made
with one secret key that all ranks share, and cut into disjoint shares.

Replicated parameters: each rank receives the sum of a slice of the entries,
puts noise of its own key into that slice, and the slices are put together
again. That moves as many bytes as the all-reduce of ordinary data parallelism,
once a logical batch, and shares out the work of making noise. Parameters that
are spread over ranks: the sums arrive spread already, and each rank adds noise
to its own shard.
"""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dp_trainer.batches import column_lengths
from dp_trainer.errors import ConfigurationError
from dp_trainer.gradients.sharding import equal_on_replicas_, is_first_replica
from dp_trainer.privacy.noise import NoiseGenerator
from dp_trainer.privacy.plan import PrivacyPlan
from dp_trainer.privacy.sampling import (
    KEY_BITS,
    FullBatchSampler,
    PoissonSampler,
    SecretKey,
    fresh_key,
    rank_slice,
    steps_per_epoch,
)
from dp_trainer.privacy.users import UserSampler, rows_by_user

# Entries reduced at a time: enough for full bandwidth, little beside the gradients themselves.
_BUCKET = 2**24
_Number = TypeVar("_Number", int, float)
# At so many places the ranks' datasets are compared.
_ROWS_COMPARED = 64


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, this one among them.

    Args:
        rank: This process, in [0, size).
        size: Number of processes.
        device: Where collective calls take their tensors.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device) -> Ranks:
        """The processes of torch's default group; this one alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def shared_key(self) -> SecretKey:
        """Returns a fresh secret key, the same on all ranks: rank 0 draws it and sends it to the others."""
        key = fresh_key()
        if self.size == 1:
            return key
        sent = torch.tensor(list(key.reveal().to_bytes(KEY_BITS // 8, "big")), device=self.device)
        dist.broadcast(sent, src=0)
        return SecretKey(int.from_bytes(bytes(sent.tolist()), "big"), secure=True)

    def noise_generator(self, *, insecure_seed: int | None = None, on_grid: bool = False) -> NoiseGenerator:
        """Returns this rank's own generator: a secret key of its own, or a fixed seed of its own."""
        if insecure_seed is not None:
            # Equal seeds would put equal noise on different entries.
            insecure_seed += self.rank << 64
        return NoiseGenerator(device=self.device, insecure_seed=insecure_seed, on_grid=on_grid)

    def check_same(self, what: Mapping[str, Any]) -> None:
        """Raises unless all ranks call it with equal values.

        Raises:
            ConfigurationError: Naming the values that differ.
        """
        if self.size == 1:
            return
        digests = {name: _digest(value) for name, value in what.items()}
        own = torch.tensor(list(digests.values()), device=self.device, dtype=torch.int64)
        bounds = torch.stack([own, -own])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        different = (bounds[0] != -bounds[1]).tolist()
        names = [name for name, differs in zip(digests, different, strict=True) if differs]
        if names:
            values = ", ".join(f"{name} = {str(what[name])[:100]}" for name in names)
            raise ConfigurationError(
                f"The ranks of this run disagree; rank {self.rank} has {values}. Build the same dataset, model and "
                "settings on every rank; each rank takes its share of every draw by itself."
            )

    def check_run(
        self, model: nn.Module, dataset: Any, plan: PrivacyPlan, settings: object = None
    ) -> list[int] | None:
        """Raises unless all ranks would train the same parameters on the same samples under the same plan.

        Samples are compared at 65 to 129 places (all, if fewer). Ranks that number
        them differently would draw some of them twice, which doubles what one sample contributes.

        Returns:
            The samples' lengths where a table knows them.

        Raises:
            ConfigurationError: Naming what differs.
        """
        if self.size == 1:
            return None
        lengths = column_lengths(dataset)
        step = max(1, len(dataset) // _ROWS_COMPARED)
        places = [*range(0, len(dataset), step), len(dataset) - 1]
        trainable = [(n, [*p.shape], p.dtype) for n, p in model.named_parameters() if p.requires_grad]
        self.check_same({
            "the dataset's length": len(dataset),
            "the privacy plan": plan.describe(),
            "the privacy settings": settings,
            "the trainable parameters": trainable,
            "the samples' lengths": lengths,
            "the samples and their order": [_digest_of_row(dataset, place) for place in places],
        })  # fmt: skip
        return lengths

    def from_first(self, micro_batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the first rank's micro-batch, on the CPU as a collator makes it."""
        if self.size == 1:
            return micro_batch
        sent = [micro_batch]
        dist.broadcast_object_list(sent, src=0, device=self.device)
        return sent[0]

    def most(self, value: _Number) -> _Number:
        """Returns the largest of the ranks' values."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return type(value)(largest)

    def total(self, counts: Tensor) -> Tensor:
        """Returns the sum of the ranks' tensors; not private, and without noise."""
        if self.size > 1:
            dist.all_reduce(counts)
        return counts

    def add_noise_once_(
        self, sums: dict[str, Tensor], noise: NoiseGenerator, std: float, *, divisor: float
    ) -> Iterator[tuple[str, Tensor]]:
        """Takes the ranks' sums, and yields the noised mean of each name: ``(Σ over ranks + noise) / divisor``.

        Args:
            sums: This rank's clipped sums by name, the same names in the same order on all ranks. What is
                spread over ranks is reduced already. Emptied, so that memory is freed as means are used.
            noise: This rank's generator, with a key of its own.
            std: Standard deviation of the noise on each entry of the whole sum.
            divisor: The public constant.
        """
        for name, total in list(sums.items()):
            if isinstance(total, DTensor):
                del sums[name]
                yield name, _noised_shard_(total, noise, std, divisor)
        replicated = list(sums)
        if self.size == 1:
            for name in replicated:
                yield name, noise.add_noise_(sums.pop(name), std, divisor=divisor)
            return
        for names in _buckets([(name, sums[name]) for name in replicated]):
            yield from self._reduced({name: sums.pop(name) for name in names}, noise, std, divisor)

    def _reduced(
        self, sums: dict[str, Tensor], noise: NoiseGenerator, std: float, divisor: float
    ) -> Iterator[tuple[str, Tensor]]:
        """The noised means of one bucket of replicated sums."""
        entries = sum(total.numel() for total in sums.values())
        # Equal slices for all ranks: the last entries of the buffer belong to no parameter.
        length = -(-entries // self.size)
        first = next(iter(sums.values()))
        buffer = first.new_zeros(length * self.size)
        torch.cat([total.flatten() for total in sums.values()], out=buffer[:entries])
        own = torch.empty_like(buffer[:length])
        dist.reduce_scatter_tensor(own, buffer)
        noise.add_noise_(own, std, divisor=divisor)
        dist.all_gather_into_tensor(buffer, own)
        pieces = torch.split(buffer[:entries], [total.numel() for total in sums.values()])
        for (name, total), piece in zip(sums.items(), pieces, strict=True):
            # Copied into its own memory: a view would keep the whole bucket alive.
            yield name, total.copy_(piece.view_as(total))


def leave_ranks() -> None:
    """Ends torch's process groups, on all ranks together; the last thing that a process of several does.

    A Python that ends while a thread of Gloo still lets go of a tensor is aborted, and the run counts as failed
    (pytorch/pytorch#190489). Threads end with the last reference to their group, so let trainers and models go
    out of scope first. DTensor keeps groups of sharded models for good.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def _noised_shard_(shard: DTensor, noise: NoiseGenerator, std: float, divisor: float) -> DTensor:
    """Turns a summed shard into its part of the noised mean, in place."""
    if is_first_replica(shard):
        noise.add_noise_(shard.to_local(), std, divisor=divisor)
    equal_on_replicas_(shard)
    return shard


def _buckets(sums: Sequence[tuple[str, Tensor]]) -> Iterator[list[str]]:
    """Names to reduce together: of one dtype, in order, of some size."""
    names: list[str] = []
    entries, dtype = 0, None
    for name, total in sums:
        if names and (entries + total.numel() > _BUCKET or total.dtype != dtype):
            yield names
            names, entries = [], 0
        names.append(name)
        entries, dtype = entries + total.numel(), total.dtype
    if names:
        yield names


def _digest(value: Any) -> int:
    # Processors round calibrated numbers differently in their last digits.
    rounded = json.loads(json.dumps(value, default=str), parse_float=lambda digits: f"{float(digits):.9g}")
    text = json.dumps(rounded, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _digest_of_row(dataset: Any, place: int) -> str:
    """Tells one sample from another; chance that a transform draws is the same on all ranks meanwhile."""
    kept = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(0)
            np.random.seed(0)
            torch.default_generator.manual_seed(0)
            row = dataset[place]
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
    return hashlib.sha256(pickle.dumps(row)).hexdigest()


def sampler_of(plan: PrivacyPlan, dataset: Any, ranks: Ranks, lengths: Sequence[int] | None) -> Any:
    """Returns the sampler of a plan: of whole draws, or of this rank's share of each.

    Args:
        plan: The run's numbers.
        dataset: The training set.
        ranks: The processes; all of them call it, and get the same fresh key.
        lengths: See ``RankSampler``.

    Raises:
        ConfigurationError: If the training set has more units than the plan was made for, or names users wrongly.
    """
    steps = steps_per_epoch(plan.dataset_size, plan.expected_batch_size)
    users = None if plan.user_column is None else rows_by_user(dataset, plan.user_column)
    units = len(dataset) if users is None else len(users)
    if units > plan.dataset_size:
        raise ConfigurationError(
            f"the training set has {units} {plan.privacy_unit}s now, and the plan was made for {plan.dataset_size}. Make "
            "a new DPTrainer for another training set."
        )
    sampler: Any = FullBatchSampler(dataset_size=units, steps=steps)
    if plan.sampling == "poisson":
        sampler = PoissonSampler(
            dataset_size=units,
            sampling_probability=plan.sampling_probability,
            batch_cap=plan.batch_cap,
            steps=steps,
            key=ranks.shared_key(),
        )
    if users is not None:
        ranks.check_same({"the users of the training set": [rows.tolist() for rows in users]})
        sampler = UserSampler(
            sampler, rows=users, samples_per_user=plan.samples_per_unit, key=ranks.shared_key()
        )
    return sampler if ranks.size == 1 else RankSampler(sampler, ranks, lengths)


class RankSampler:
    """This rank's share of each draw of a sampler.

    Guarantee: the ranks' shares of a draw are disjoint and together the whole
    draw, provided that all ranks hold the same draws: samplers with the same key.

    Args:
        sampler: Draws of the whole logical batch.
        ranks: The processes that share it.
        lengths: Each sample's length, if known: the longest are dealt out first, so that ranks get
            about the same work. The same on all ranks.
    """

    def __init__(self, sampler: Any, ranks: Ranks, lengths: Sequence[int] | None = None) -> None:
        self.sampler = sampler
        self.ranks = ranks
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._taken = 0

    def __iter__(self) -> Iterator[list[int]]:
        # DataLoaders draw ahead, and an epoch that ends early leaves some ranks further ahead than others. Draws
        # are passed over, never repeated.
        for _ in range(self.ranks.most(self._taken) - self._taken):
            self._draw()
        for _ in range(len(self.sampler)):
            yield self.share(self._draw())

    def _draw(self) -> list[int]:
        self._taken += 1
        return list(self.sampler.draw())

    def __len__(self) -> int:
        return len(self.sampler)

    def share(self, draw: Sequence[int]) -> list[int]:
        """Returns this rank's samples of a draw."""
        if self._lengths is None or self.ranks.size == 1:
            return rank_slice(draw, self.ranks.rank, self.ranks.size)
        indices = np.asarray(draw, dtype=np.int64)
        ordered = indices[np.argsort(-self._lengths[indices], kind="stable")]
        # There and back: else rank 0 would have the longest of every round.
        rounds, place = np.divmod(np.arange(len(ordered)), self.ranks.size)
        dealt_to = np.where(rounds % 2 == 0, place, self.ranks.size - 1 - place)
        return [int(index) for index in ordered[dealt_to == self.ranks.rank]]
