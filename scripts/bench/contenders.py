"""Whole training steps: the plain one, this package's, and two of Opacus.

A step of k micro-batches is one optimizer step: gradients of k micro-batches of
the same size, accumulated, then fused AdamW over what trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Batch, Case
from bench.device import Device
from dp_trainer import PrivacyArguments
from dp_trainer.gradients.capture import Use
from dp_trainer.gradients.certificate import LARGEST_EXCESS
from dp_trainer.losses import per_sample_loss_for
from dp_trainer.privacy.noise import NoiseGenerator
from dp_trainer.privacy.plan import PrivacyPlan, make_plan
from dp_trainer.release import release

NOISE_MULTIPLIER = 0.6
LEARNING_RATE = 1e-4
# Only the accounting, which no step waits for, depends on these two.
DATASET_SIZE, DELTA = 1_000_000, 1e-7


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to train.

    Args:
        model: What is trained.
        gradients: Takes a number of micro-batches; leaves their gradient in ``.grad``.
        optimizer: Over the trainable parameters.
    """

    model: nn.Module
    gradients: Callable[[int], None]
    optimizer: Any

    def step(self, micro_batches: int) -> None:
        """One optimizer step."""
        self.gradients(micro_batches)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _build(case: Case, device: Device) -> tuple[nn.Module, Batch]:
    batch = {name: column.to(device.name) for name, column in case.batch().items()}
    return case.model().to(device.name).train(), batch


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)


def plain(case: Case, device: Device) -> Contender:
    """The ordinary step: the model's own loss, averaged over each micro-batch and accumulated."""
    model, batch = _build(case, device)

    def gradients(micro_batches: int) -> None:
        for _ in range(micro_batches):
            with device.autocast():
                loss = model(**batch).loss / micro_batches
            loss.backward()

    return Contender(model=model, gradients=gradients, optimizer=_optimizer(model))


def private(case: Case, device: Device, *, noise_multiplier: float = NOISE_MULTIPLIER) -> Contender:
    """This package's release, as ``DPTrainer`` makes it: automatic clipping, noise, every new use checked."""
    model, batch = _build(case, device)
    head_loss, noise = per_sample_loss_for(model), NoiseGenerator(device=device.name)
    verified: set[Use] = set()
    plans: dict[int, PrivacyPlan] = {}

    def per_sample_loss(module: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
        with device.autocast():
            return head_loss(module, micro_batch)

    def gradients(micro_batches: int) -> None:
        samples = len(batch["labels"]) * micro_batches
        if samples not in plans:
            plans[samples] = plan_for(samples, noise_multiplier)
        release(
            model,
            [batch] * micro_batches,
            per_sample_loss=per_sample_loss,
            plan=plans[samples],
            noise=noise,
            strategy="automatic",
            rounding_margin=LARGEST_EXCESS,
            verified=verified,
        )

    return Contender(model=model, gradients=gradients, optimizer=_optimizer(model))


def plan_for(samples: int, noise_multiplier: float) -> PrivacyPlan:
    """The numbers of a one-step run with logical batches of so many samples."""
    arguments = PrivacyArguments(noise_multiplier=noise_multiplier, target_delta=DELTA)
    return make_plan(arguments, dataset_size=DATASET_SIZE, expected_batch_size=samples, steps=1)


def opacus(case: Case, device: Device, *, grad_sample_mode: str) -> Contender:
    """Opacus, flat clipping: "ghost" runs two backward passes, "hooks" stores per-sample gradients."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    assert case.for_opacus is not None, f"Opacus is not compared on: {case.title}"
    model, batch = case.for_opacus(*_build(case, device))
    labels = batch.pop("labels")
    samples = len(labels)
    if labels.dim() == 2:
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=_optimizer(model),
        criterion=nn.CrossEntropyLoss(),
        # Only its length is read: it tells Opacus the expected batch size.
        data_loader=DataLoader(TensorDataset(torch.zeros(10 * samples)), batch_size=samples),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=grad_sample_mode,
    )
    module, optimizer = made[0], made[1]
    criterion = made[2] if grad_sample_mode == "ghost" else nn.CrossEntropyLoss()

    def gradients(micro_batches: int) -> None:
        assert micro_batches == 1, "Opacus is compared on one micro-batch a step"
        with device.autocast():
            logits = module(**batch).logits
            shape = {"shape": logits.shape} if grad_sample_mode == "ghost" and logits.dim() == 3 else {}
            loss = criterion(logits.flatten(0, -2), labels.flatten(), **shape)
        loss.backward()

    return Contender(model=module, gradients=gradients, optimizer=optimizer)


CONTENDERS: dict[str, Callable[[Case, Device], Contender]] = {
    "plain": plain,
    "dp_trainer": private,
    "opacus-ghost": lambda case, device: opacus(case, device, grad_sample_mode="ghost"),
    "opacus-hooks": lambda case, device: opacus(case, device, grad_sample_mode="hooks"),
}
