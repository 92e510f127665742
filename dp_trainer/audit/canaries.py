"""Canaries: samples whose gradient the auditor chooses, in the trainer that is audited.

The model gets one more trainable table, with one entry a canary. A canary's loss
is its weight times its entry, so its gradient is known exactly and touches no
other parameter; everything else in the step is the trainer's own code. A canary
is far longer than the clipping norm, so a run that does not clip shows at once.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments

from dp_trainer.batches import DataCollator, LogicalBatch, LogicalBatchCollator
from dp_trainer.errors import ConfigurationError
from dp_trainer.gradients.independence import repeatable
from dp_trainer.gradients.strategies import PerSampleLoss
from dp_trainer.privacy.clipping import ClippingFunction, GlobalClipping
from dp_trainer.privacy.plan import PrivacyPlan
from dp_trainer.trainer import DPTrainer

TABLE = "audit_canaries"
WEIGHT = f"{TABLE}.weight"
_ENTRY, _FACTOR = "audit_entry", "audit_factor"
# How far beyond the clipping norm a canary's gradient reaches.
_EXCESS = 1e3


@dataclass(frozen=True)
class CanaryLoss:
    """The run's own per-sample loss; for a canary its factor times its entry of the table instead.

    Args:
        own: The run's loss.
    """

    own: PerSampleLoss

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
        """Returns the losses, (B,)."""
        inputs = dict(micro_batch)
        entries_B1, factors_B = inputs.pop(_ENTRY), inputs.pop(_FACTOR)
        canary_B = factors_B * F.embedding(entries_B1, getattr(model, TABLE).weight)[:, 0, 0]
        losses_B = self.own(model, inputs)
        total_B: Tensor = torch.where(factors_B == 0, losses_B, torch.zeros_like(losses_B)) + canary_B
        return total_B


@dataclass(frozen=True)
class CanaryCollator:
    """The run's own collator, with the two columns that make canaries.

    Args:
        own: The run's collator.
    """

    own: DataCollator

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        """Collates; a sample without the columns is an ordinary one."""
        ours = (_ENTRY, _FACTOR)
        batch = self.own([{k: v for k, v in sample.items() if k not in ours} for sample in samples])
        return {
            **batch,
            _ENTRY: torch.tensor([[sample.get(_ENTRY, 0)] for sample in samples]),
            _FACTOR: torch.tensor([float(sample.get(_FACTOR, 0.0)) for sample in samples]),
        }


def canary(base: Mapping[str, Any], entry: int, factor: float) -> dict[str, Any]:
    """A sample whose gradient is ``factor`` at one entry of the table and zero elsewhere.

    Args:
        base: A real sample, for the columns that the model needs.
        entry: Which entry, from 0.
        factor: The gradient there; not zero.
    """
    return {**base, _ENTRY: entry, _FACTOR: factor}


def canary_length(clipping: ClippingFunction) -> float:
    """Length of a canary's gradient at which its contribution is as long as clipping lets it be."""
    if isinstance(clipping, GlobalClipping):
        return 0.98 * clipping.cutoff
    return _EXCESS * max(clipping.clipping_norm, getattr(clipping, "gamma", 0.0))


class CanaryTrainer(DPTrainer):
    """The audited trainer on other samples: same model, same arguments, same mechanism.

    Guarantee: noise multiplier, sampling probability, cap, divisor, clipping and strategy are
    those of ``audited.plan``; the audited trainer and its model are left as they were. The certificate
    is off: the audit stands on its own.

    Args:
        audited: The run in question.
        samples: Training set of the audit, canaries among them.
        entries: Entries of the canaries' table.
        steps: Releases that may be made.
        noised: False leaves the noise out, to see the clipped sums themselves.

    Raises:
        ConfigurationError: If there are more samples than the run's public number.
    """

    def __init__(
        self, *, audited: DPTrainer, samples: Sequence[Any], entries: int, steps: int, noised: bool
    ) -> None:
        plan = audited.plan
        if len(samples) > plan.dataset_size:
            raise ConfigurationError(
                f"The audit needs {len(samples)} samples and the run's public number is {plan.dataset_size}: more "
                "would change its sampling probability. Lower audit_canaries or audit_samples."
            )
        model = copy.deepcopy(audited.accelerator.unwrap_model(audited.model))
        device = next(model.parameters()).device
        model.add_module(TABLE, nn.Embedding(entries, 1, device=device))
        nn.init.zeros_(getattr(model, TABLE).weight)
        # Its ε is of no interest here, and no ε must be claimed for it.
        self._planned = replace(
            plan,
            noise_multiplier=plan.noise_multiplier if noised else 0.0,
            steps=steps,
            steps_asked=steps,
            target_epsilon=None,
            epsilon=math.inf,
        )
        privacy = replace(audited.privacy, certificate_samples=0)
        with _without_remarks():
            super().__init__(
                model=model,
                args=_quiet(audited.args, steps),
                data_collator=audited.data_collator,
                train_dataset=list(samples),
                compute_loss_func=audited.compute_loss_func,
                optimizer_cls_and_kwargs=audited.optimizer_cls_and_kwargs,
                privacy=privacy,
            )
        self.remove_callback(PrinterCallback)

    def _make_plan(self) -> PrivacyPlan:
        return self._planned

    def _head_loss(self) -> PerSampleLoss:
        return CanaryLoss(super()._head_loss())

    def _training_data(self) -> tuple[Any, Any]:
        samples, collator = super()._training_data()
        return samples, CanaryCollator(collator)

    def loss_of(self, sample: Any) -> Tensor:
        """The loss of one sample alone, a scalar with its graph."""
        micro_batch = self._prepare_inputs(self._collated([sample]))
        return self._per_sample_loss()(self.model, micro_batch).sum()

    def batch(self, samples: Sequence[Any], *, samples_per_micro_batch: int | None = None) -> LogicalBatch:
        """A logical batch of just these samples, as if they had been drawn; none for several ranks but the first."""
        if self._ranks.rank:
            return LogicalBatch((), ())
        collate = LogicalBatchCollator(
            data_collator=self._training_data()[1],
            samples_per_micro_batch=samples_per_micro_batch or max(1, len(samples)),
        )
        return collate(samples)

    def released(self, batch: LogicalBatch, *, dropout: bool = False) -> dict[str, Tensor]:
        """Makes one release with the trainer's own step.

        Args:
            batch: What was drawn.
            dropout: Whether to leave it on: faster, but sums are then not to be compared.

        Returns:
            Name → ``.grad`` times the divisor: the noised sum, for every trainable parameter.
        """
        with contextlib.nullcontext() if dropout else repeatable(self.model):
            self.training_step(self.model, batch)
        divisor = self.plan.divisor
        return {
            name: p.grad.detach().float() * divisor
            for name, p in self.model.named_parameters()
            if p.requires_grad and p.grad is not None
        }


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """While inside, nothing is said about settings that the audited trainer has spoken of already."""
    ours = logging.getLogger("dp_trainer")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)


def _quiet(args: TrainingArguments, steps: int) -> TrainingArguments:
    """The run's arguments with everything off that writes, evaluates or reports."""
    quiet = copy.copy(args)
    quiet.max_steps = steps
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        setattr(quiet, name, type(getattr(args, name)).NO)
    quiet.report_to = []
    quiet.disable_tqdm = True
    quiet.eval_on_start = quiet.load_best_model_at_end = quiet.push_to_hub = False
    quiet.dataloader_num_workers = 0
    quiet.dataloader_persistent_workers = False
    quiet.dataloader_prefetch_factor = None
    return quiet


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries as one float64 vector on the CPU."""
    return torch.cat([tensor.detach().double().flatten().cpu() for tensor in tensors.values()])
