"""``DPTrainer``: connects a privacy plan to ``transformers.Trainer``.

No privacy logic lives here. The numbers are in ``privacy/plan.py``, the tensors
in ``release.py``; this module hands one to the other at the Trainer's own
extension points. One item of the train DataLoader is one logical batch, so that
optimizer steps, releases and ``state.global_step`` are the same count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from dp_trainer import checkpoints, records, workers
from dp_trainer.arguments import PrivacyArguments
from dp_trainer.batches import LogicalBatch, LogicalBatchCollator, spread_by_length
from dp_trainer.distributed import Ranks, sampler_of
from dp_trainer.errors import ConfigurationError, PrivacyBudgetError
from dp_trainer.gradients.capture import Use
from dp_trainer.gradients.certificate import LARGEST_EXCESS, Certificate, certify
from dp_trainer.gradients.halving import Halving
from dp_trainer.gradients.independence import check_independence, repeatable
from dp_trainer.gradients.sharding import put_to_rest
from dp_trainer.gradients.strategies import MicroBatch, PerSampleLoss
from dp_trainer.losses import HeadLoss, check_against_model_loss, custom_loss, inside, per_sample_loss_for
from dp_trainer.planning import computed_outside, plan_of_run
from dp_trainer.preemption import saves_on_sigterm
from dp_trainer.privacy.accountant import PrivacyAccountant
from dp_trainer.privacy.plan import PrivacyPlan
from dp_trainer.privacy.statement import PrivacyStatement, privacy_statement
from dp_trainer.publication import PublishingTrainer, refuse_unpublishable
from dp_trainer.refusals import (
    refuse_foreign_parameters,
    refuse_unsupported_arguments,
    refuse_unsupported_backend,
    refuse_unsupported_modules,
    refuse_unsupported_optimizer,
    with_fixed_arguments,
)
from dp_trainer.release import release
from dp_trainer.searching import SearchingTrainer

logger = logging.get_logger(__name__)

# How many of the first samples the certificate chooses its few from.
_CERTIFICATE_POOL = 64
# A layout that depends on the data may go wrong later than in the certificate's few samples.
_STEPS_BETWEEN_LOOKS = 50


class DPTrainer(PublishingTrainer, SearchingTrainer):
    """A ``Trainer`` whose every optimizer step sees a differentially private gradient.

    Guarantee: the trained weights are (ε, δ)-differentially private with respect
    to adding or removing one sample of ``train_dataset`` (or replacing one, or one user with all
    rows, where ``privacy`` says so), with the ε, δ and mechanism that ``plan`` and
    ``privacy_statement()`` name, if ``train_dataset`` was prepared sample by sample. Logs, evaluation
    results and model selection are outside it.

    Everything not listed works as in ``Trainer``. The expected logical batch size is
    ``per_device_train_batch_size × gradient_accumulation_steps × processes``, unless
    ``privacy.expected_batch_size`` says it; ``per_device_train_batch_size`` is the micro-batch.

    Args:
        privacy: The privacy settings; the only new argument.
        compute_loss_func: As in ``Trainer``, but returns one loss a sample, (B,).

    Raises:
        ConfigurationError: If the settings or the dataset cannot give the guarantee.
        UnsupportedOperationError: If a feature or the model's head has no private form here.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., Any] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        privacy: PrivacyArguments,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args
        if privacy.certificate_samples == 0:
            logger.warning("certificate_samples=0: gradients are not checked against plain autograd.")
        refuse_unsupported_arguments(args)
        refuse_unsupported_optimizer(optimizers[0])
        refuse_unpublishable(args, privacy)
        self.privacy = privacy
        self._accumulation = args.gradient_accumulation_steps
        self._steps_wanted = args.max_steps
        self._new_trial = False
        super().__init__(
            model=model,
            args=with_fixed_arguments(args),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.certificate: Certificate | None = None
        self._certified: frozenset[str] | None = None
        self._verified_uses: set[Use] = set()
        self._halving = Halving()
        self._dropped_samples = 0
        refuse_unsupported_backend(self.accelerator)
        self._ranks = Ranks.current(self.args.device)
        self._noise = self._ranks.noise_generator(
            insecure_seed=privacy.insecure_noise_seed, on_grid=privacy.secure_noise
        )
        self._accountant: PrivacyAccountant | None = None
        if train_dataset is not None:
            refuse_unsupported_modules(self.model)
            self._head_loss()
            self._accountant = PrivacyAccountant(self._make_plan())

    # The run's numbers.

    @property
    def accountant(self) -> PrivacyAccountant:
        """Counts the steps spent, over all calls of ``train``."""
        if self._accountant is None:
            raise ConfigurationError("DPTrainer has no train_dataset, so there is no privacy plan. Pass one.")
        return self._accountant

    @property
    def plan(self) -> PrivacyPlan:
        """The numbers of this run; ``str(plan)`` prints them."""
        return self.accountant.plan

    def privacy_statement(self) -> PrivacyStatement:
        """States what is guaranteed for the weights as they are now, and what is not."""
        return privacy_statement(
            self.plan,
            steps=self.accountant.steps_spent,
            certificate=self.certificate.describe() if self.certificate else None,
            generator=self._noise.describe(),
            other_computations=computed_outside(self.args, self.state, self.search_cost),
        )

    def published_statement(self) -> PrivacyStatement | None:
        """The statement that goes with saved weights; None before the first release."""
        if self._accountant is None or not self.accountant.steps_spent:
            return None
        statement = self.privacy_statement()
        return statement if self.privacy.release_training_metrics else statement.published()

    def _make_plan(self) -> PrivacyPlan:
        return plan_of_run(
            self.args,
            self.privacy,
            self.train_dataset,
            accumulation=self._accumulation,
            steps_wanted=self._steps_wanted,
        )

    # The Trainer's extension points.

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; as ``Trainer.train``.

        A resumed run continues the count of its checkpoint exactly and draws fresh keys; True means the newest
        complete checkpoint. SIGTERM saves one after the step under way and exits with 143.

        Raises:
            ConfigurationError: If the checkpoint is incomplete, damaged or of another plan.
            PrivacyBudgetError: If the budget is spent already.
            RunFaultError: If a checkpoint cannot be written, or a DataLoader worker died.
        """
        # The Trainer sets a trial's arguments later; get_train_dataloader then plans it afresh.
        self._new_trial = trial is not None
        accountant = self.accountant
        checkpoint = checkpoints.to_resume(resume_from_checkpoint, self.args.output_dir)
        self._ranks.check_same({"the checkpoint to resume from": str(checkpoint)})
        if checkpoint is not None:
            records.load(checkpoint, accountant)
        if accountant.steps_spent >= self.plan.steps and trial is None:
            where = f" Its weights are in {checkpoint}." if checkpoint else ""
            raise PrivacyBudgetError(
                f"All {self.plan.steps} steps of this run's budget are spent (ε = {accountant.epsilon:.3f}).{where} "
                "A further run on the same data needs a new DPTrainer, and its ε adds to this one."
            )
        with saves_on_sigterm(self):
            return super().train(checkpoint and str(checkpoint), trial, ignore_keys_for_eval)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A DataLoader with one logical batch per item."""
        if self._new_trial:
            self._plan_trial()
        plan = self.plan
        self.args.max_steps = plan.steps
        dataset, collator = self._training_data()
        lengths = self._ranks.check_run(self.model, dataset, plan, self.privacy)
        return DataLoader(
            dataset,
            batch_sampler=sampler_of(plan, dataset, self._ranks, lengths),
            collate_fn=LogicalBatchCollator(
                data_collator=collator,
                samples_per_micro_batch=self.args.per_device_train_batch_size,
                tokens_per_micro_batch=self.privacy.micro_batch_tokens,
            ),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=functools.partial(workers.start_worker, rank=self.args.process_index),
        )

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[LogicalBatch], None]:
        """The next logical batch; target counts of the batch are left out, since they would couple samples."""
        with workers.explained(steps_spent=self.accountant.steps_spent, step=self.state.global_step):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Creates the optimizer; any that works on ``.grad`` alone sees privatized gradients only."""
        optimizer: torch.optim.Optimizer
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        refuse_unsupported_optimizer(optimizer)
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: LogicalBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Makes one release: leaves the privatized mean gradient in ``.grad`` of every trainable parameter.

        Returns:
            The mean loss of the drawn samples, for the log. Not private.
        """
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers
        module = self.accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        # Ranks of a sharded model must make equally many forward passes.
        sharded, count = put_to_rest(module), len(inputs.micro_batches)
        fillers = (
            [self._collated([self.train_dataset[0]])] * (self._ranks.most(count) - count) if sharded else []
        )
        self._halving.allowed = not sharded
        self._check_before_release(module, [*inputs.micro_batches, *fillers])
        # Counted before the optimizer can apply it: a crash may count a step too many, never one too few.
        self.accountant.spend_step()
        report = release(
            module,
            inputs.micro_batches,
            per_sample_loss=self._per_sample_loss(),
            plan=self.plan,
            noise=self._noise,
            strategy=self.privacy.strategy,
            rounding_margin=self.certificate.rounding_margin if self.certificate else LARGEST_EXCESS,
            verified=self._verified_uses if self.privacy.certificate_samples else None,
            prepare=self._prepare_inputs,
            halving=self._halving,
            ranks=self._ranks,
            fillers=fillers,
        )
        if report.dropped_samples:
            self._dropped_samples += report.dropped_samples
            logger.warning(
                f"step {self.state.global_step}: {report.dropped_samples} of {report.samples} samples left out, "
                "their gradients were NaN or infinite. Check the data or lower the learning rate."
            )
        return report.mean_loss.to(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as ``Trainer``; training lines also say the ε spent so far."""
        if self._accountant is not None and ("loss" in logs or "train_loss" in logs):
            logs["epsilon"] = self.accountant.epsilon_in_logs
            if self._dropped_samples:
                logs["dropped_samples"] = self._dropped_samples
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves a checkpoint that is complete or known not to be, the accountant's record in it."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        wait = self.accelerator.wait_for_everyone
        with checkpoints.saving(folder, self.args, self.state, self.accountant, wait=wait):
            super()._save_checkpoint(model, trial)
        self.push_checkpoint(folder)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The expected logical batch size in rows, at most."""
        return self.plan.divisor

    def floating_point_ops(self, inputs: LogicalBatch) -> int:
        """Operations of the ordinary forward and backward of all micro-batches."""
        return sum(int(super(DPTrainer, self).floating_point_ops(batch)) for batch in inputs.micro_batches)

    def _plan_trial(self) -> None:
        """Plans one trial of a hyper-parameter search: a release of its own, with its own budget."""
        self._new_trial = False
        if self.args.gradient_accumulation_steps != 1:
            self._accumulation = self.args.gradient_accumulation_steps
        # A trial that sets max_steps says so after the last plan wrote its own.
        if self.args.max_steps != self.plan.steps:
            self._steps_wanted = self.args.max_steps
        self.args = with_fixed_arguments(self.args)
        self._accountant = PrivacyAccountant(self._make_plan())
        self._trials = (*self._trials, self._accountant)
        self._certified = None

    def _training_data(self) -> tuple[Any, Any]:
        """The training set, and its collator for the columns that the model takes."""
        return self.train_dataset, self._get_collator_with_removed_columns(self.data_collator, "training")

    # Losses and the checks before the first release.

    def _head_loss(self) -> PerSampleLoss:
        if self.compute_loss_func is not None:
            return custom_loss(self.compute_loss_func)
        return per_sample_loss_for(self.model, label_smoothing=self.args.label_smoothing_factor)

    def _per_sample_loss(self) -> PerSampleLoss:
        return inside(self.compute_loss_context_manager, self._head_loss())

    def _check_before_release(self, model: nn.Module, pieces: Sequence[MicroBatch]) -> None:
        """The certificate once for each set of trainable parameters; now and then a look at real micro-batches."""
        if self.privacy.certificate_samples == 0:
            return
        trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        fresh = trainable != self._certified
        if fresh:
            refuse_foreign_parameters(self.optimizer, model)
            self.certificate = self._certify(model)
            self._certified, self._verified_uses = trainable, set()
        if self.privacy.strategy in ("direct", "loop"):
            return
        due: set[int] = set()
        if fresh or self.state.global_step % _STEPS_BETWEEN_LOOKS == 0:
            due = {0, len(pieces) // 2, len(pieces) - 1} if fresh else {len(pieces) // 2}

        def look(micro_batches: Iterable[MicroBatch]) -> None:
            for micro_batch in micro_batches:
                with repeatable(model):
                    check_independence(model, self._prepare_inputs(micro_batch), self._per_sample_loss())

        self._halving.run([piece for index, piece in enumerate(pieces) if index in due], look)

    def _collated(self, samples: Sequence[Any]) -> MicroBatch:
        """Samples of the training set as one micro-batch."""
        collator = self._training_data()[1]
        collate = LogicalBatchCollator(data_collator=collator, samples_per_micro_batch=len(samples))
        return collate(samples).micro_batches[0]

    def _certify(self, model: nn.Module) -> Certificate:
        """Compares losses and gradients with their slow twins on a few real samples."""
        rows = range(min(len(self.train_dataset), _CERTIFICATE_POOL))
        chosen = spread_by_length([self.train_dataset[row] for row in rows], self.privacy.certificate_samples)
        # A collator may draw by chance; ranks compare the same samples.
        micro_batch = self._prepare_inputs(self._ranks.from_first(self._collated(chosen)))
        head_loss = self._head_loss()
        if isinstance(head_loss, HeadLoss):
            with self.compute_loss_context_manager():
                check_against_model_loss(model, micro_batch, head_loss)
        return certify(
            model,
            micro_batch,
            per_sample_loss=self._per_sample_loss(),
            clipping=self.plan.clipping,
            strategy=self.privacy.strategy,
            computation_dtype=torch.bfloat16 if self.args.bf16 else None,
        )
