"""Faults to plant in a run, by patching: each was made by some trainer, or might be.

A fault is a function of a ``pytest.MonkeyPatch``; nothing in the package can switch one on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

import dp_trainer.release
import dp_trainer.trainer
from dp_trainer.batches import micro_batch_size
from dp_trainer.distributed import Ranks
from dp_trainer.losses import CustomLoss
from dp_trainer.privacy.accountant import PrivacyAccountant
from dp_trainer.privacy.clipping import ClippingFunction
from dp_trainer.privacy.noise import NoiseGenerator
from dp_trainer.privacy.sampling import PoissonSampler


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: For the table.
        plant: Patches it in.
        seen_by: Layers that must see it.
        listed: Whether the audit must see it by the design, or it is one more.
    """

    name: str
    plant: Callable[[pytest.MonkeyPatch], None]
    seen_by: tuple[str, ...]
    listed: bool = True

    def __str__(self) -> str:
        return self.name


def less_noise(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        add = NoiseGenerator.add_noise_
        patch.setattr(
            NoiseGenerator, "add_noise_", lambda self, t, std, *, divisor=1: add(self, t, std * factor, divisor=divisor)
        )  # fmt: skip

    return plant


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClippingFunction, "__call__", lambda self, norms: torch.ones_like(norms))


def clipping_the_batch(patch: pytest.MonkeyPatch) -> None:
    """Every micro-batch's summed gradient is clipped, not each sample's."""
    whole = dp_trainer.release.clipped_gradient_sum
    clip = ClippingFunction.__call__

    def batch_clipped(model, pieces, *, clipping, **others):
        # Ones in place of factors give the plain sum.
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(ClippingFunction, "__call__", lambda self, norms: torch.ones_like(norms))
            plain = whole(model, pieces, clipping=clipping, **others)
        norm = torch.stack([g.norm() for g in plain.gradients.values()]).norm()
        factor = clip(clipping, norm[None])[0]
        return replace(plain, gradients={name: g * factor for name, g in plain.gradients.items()})

    patch.setattr(dp_trainer.release, "clipped_gradient_sum", batch_clipped)


def same_noise_every_step(patch: pytest.MonkeyPatch) -> None:
    original = NoiseGenerator._add_to_
    keys: dict[tuple[int, int], int] = {}

    def add(self, values, std, divisor):
        # One key for each generator and size, drawn once.
        key = keys.setdefault((id(self), len(values)), int(torch.seed()) % 2**60)
        original(NoiseGenerator(device=self.device, insecure_seed=key), values, std, divisor)

    patch.setattr(NoiseGenerator, "_add_to_", add)


def token_mean_loss(patch: pytest.MonkeyPatch) -> None:
    original = CustomLoss.__call__

    def mean_over_all_tokens(self, model, micro_batch):
        counts_B = micro_batch["attention_mask"].sum(1)
        return original(self, model, micro_batch) * counts_B / counts_B.sum()

    patch.setattr(CustomLoss, "__call__", mean_over_all_tokens)


def dividing_by_the_drawn_size(patch: pytest.MonkeyPatch) -> None:
    original = dp_trainer.release.release

    def release(model, micro_batches, *, plan, **others):
        report = original(model, micro_batches, plan=plan, **others)
        for parameter in model.parameters():
            parameter.grad *= plan.divisor / max(1, sum(map(micro_batch_size, micro_batches)))
        return report

    patch.setattr(dp_trainer.trainer, "release", release)


def only_the_last_micro_batch(patch: pytest.MonkeyPatch) -> None:
    whole = dp_trainer.release.clipped_gradient_sum
    patch.setattr(
        dp_trainer.release,
        "clipped_gradient_sum",
        lambda model, pieces, **others: whole(model, list(pieces)[-1:], **others),
    )


def no_noise_on_empty_draws(patch: pytest.MonkeyPatch) -> None:
    original = dp_trainer.release.release

    def release(model, micro_batches, *, plan, **others):
        if micro_batches:
            return original(model, micro_batches, plan=plan, **others)
        return original(model, micro_batches, plan=replace(plan, noise_multiplier=0.0), **others)

    patch.setattr(dp_trainer.trainer, "release", release)


def no_noise_on_unused_parameters(patch: pytest.MonkeyPatch) -> None:
    add = NoiseGenerator.add_noise_

    def add_noise_(self, tensor, std, *, divisor=1):
        return add(self, tensor, std if bool(tensor.any()) else 0.0, divisor=divisor)

    patch.setattr(NoiseGenerator, "add_noise_", add_noise_)


def noise_from_the_global_generator(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        NoiseGenerator,
        "_add_to_",
        lambda self, values, std, divisor: values.add_(torch.randn(len(values)), alpha=std).div_(divisor),
    )


def uniform_noise(patch: pytest.MonkeyPatch) -> None:
    half = math.sqrt(3.0)
    patch.setattr(
        NoiseGenerator,
        "_add_to_",
        lambda self, values, std, divisor: values.add_(
            torch.empty(len(values)).uniform_(-half, half, generator=_fresh()), alpha=std
        ).div_(divisor),
    )


def _fresh() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def shuffled_batches(patch: pytest.MonkeyPatch) -> None:
    """Each epoch deals out a permutation, and the accounting still says Poisson."""

    def batches(self):
        size = round(self.dataset_size * self.sampling_probability)
        order = self._generator.permutation(self.dataset_size)
        for start in range(0, self.dataset_size - size + 1, size):
            yield sorted(order[start : start + size].tolist())

    patch.setattr(PoissonSampler, "__iter__", batches)


def drawing_twice_as_often(patch: pytest.MonkeyPatch) -> None:
    original = PoissonSampler.__init__

    def init(self, **settings):
        original(self, **{**settings, "sampling_probability": 2 * settings["sampling_probability"]})

    patch.setattr(PoissonSampler, "__init__", init)


def counting_every_second_release(patch: pytest.MonkeyPatch) -> None:
    original = PrivacyAccountant.spend_step
    calls = iter(range(10**9))
    patch.setattr(
        PrivacyAccountant, "spend_step", lambda self: original(self) if next(calls) % 2 == 0 else None
    )


def one_noise_key_for_all_ranks(patch: pytest.MonkeyPatch) -> None:
    """Fresh in every run, and the same on every rank of it."""

    def noise_generator(self, *, insecure_seed=None, on_grid=False):
        return NoiseGenerator(device=self.device, insecure_seed=self.shared_key().reveal(), on_grid=on_grid)

    patch.setattr(Ranks, "noise_generator", noise_generator)


FAULTS = (
    Fault("half of the noise (σ/2)", less_noise(0.5), ("exact", "step")),
    Fault("σ/√2", less_noise(1 / math.sqrt(2)), ("exact", "step")),
    Fault("no clipping", no_clipping, ("exact", "step", "one_run")),
    Fault("clipping the batch, not each sample", clipping_the_batch, ("exact", "step")),
    Fault("the same noise every step", same_noise_every_step, ("exact", "step")),
    Fault("token-mean loss", token_mean_loss, ("exact",)),
    Fault("dividing by the drawn size", dividing_by_the_drawn_size, ("exact",), listed=False),
    Fault("only the last micro-batch counts", only_the_last_micro_batch, ("exact",), listed=False),
    Fault("no noise on empty draws", no_noise_on_empty_draws, ("exact",), listed=False),
    Fault("no noise where no sample contributes", no_noise_on_unused_parameters, ("exact",), listed=False),
    Fault(
        "noise from the generator that set_seed fixes",
        noise_from_the_global_generator,
        ("exact",),
        listed=False,
    ),
    Fault("uniform noise of the right std", uniform_noise, ("exact",), listed=False),
    Fault("shuffled batches accounted as Poisson", shuffled_batches, ("exact",), listed=False),
    Fault("twice the sampling probability", drawing_twice_as_often, ("exact",), listed=False),
    Fault("every second release counted", counting_every_second_release, ("exact", "one_run"), listed=False),
)


@contextmanager
def planted(fault: Fault | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            fault.plant(patch)
        yield
