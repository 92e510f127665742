"""Per-sample losses of shape (B,), by the model's head.

Guarantee: entry b of the losses depends on sample b's logits and labels alone,
so that its gradient is sample b's gradient, as long as the model itself keeps
samples apart (the certificate checks that). Each sample's loss is the mean over
its own targets; a sample without a target has loss and gradient exactly 0.

A head's own loss averages over all targets of the micro-batch, so one sample's
length changes every other sample's gradient and the sensitivity bound is lost.
That loss is therefore never trained on. It only serves
:func:`check_against_model_loss`, which compares the two once, on real samples.

Axes: B sample, T target position, G part of a loss.

Source: Li et al. 2021 (arXiv 2110.05679) for the mean over a sample's own tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_trainer.errors import CertificateError, ConfigurationError, UnsupportedOperationError
from dp_trainer.heads import CAUSAL_LM, HEADS, Head, head_of_class
from dp_trainer.terms import IGNORED_LABEL, WAY_OUT, HeadSettings, LossTerms

PerSampleLoss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""Takes the model and one collated micro-batch, returns the samples' losses, (B,)."""


@dataclass(frozen=True, kw_only=True)
class HeadLoss:
    """The per-sample loss of a head that is in the table: a :data:`PerSampleLoss`.

    Guarantee: see the module. The model's own loss is never computed, since it
    is called without labels; a decoder gets the inputs that its labels imply.

    Args:
        head: The row of the table.
        class_name: The model's class, for messages.
        label_smoothing: The share of each target spread evenly over all classes.
    """

    head: Head
    class_name: str
    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
        """Runs the model and returns the losses, (B,), in float32 at least."""
        return self.terms(model, micro_batch).per_sample

    def terms(self, model: nn.Module, micro_batch: Mapping[str, Any], *, as_model: bool = False) -> LossTerms:
        """Runs the model and returns each sample's sum over targets with its count of targets.

        With ``as_model``, by the rules of the model's own loss even where these
        couple samples: for comparing the two, never for training.
        """
        labels, inputs = self._split(model, micro_batch)
        outputs = model(**inputs)
        base = _base_model(model)
        settings = HeadSettings(
            place=f"{self.class_name} ({self.head.name})",
            model=base,
            inputs=inputs,
            label_smoothing=self.label_smoothing,
            problem_type=getattr(base.config, "problem_type", None),
            virtual_tokens=_virtual_tokens(model),
            as_model=as_model,
        )
        return self.head.terms(outputs, labels, settings)

    def _split(
        self, model: nn.Module, micro_batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        labels, inputs = {}, dict(micro_batch)
        for name in self.head.labels:
            value = inputs.pop(name, None)
            if not isinstance(value, Tensor):
                raise ConfigurationError(
                    f"{self.class_name} ({self.head.name}) needs the column '{name}', and the micro-batch "
                    f"has {sorted(micro_batch)}. Name it so in the dataset, or add it in the data collator. "
                    f"If the model is trained otherwise: {WAY_OUT}"
                )
            labels[name] = value
        given = any(inputs.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds"))
        if self.head.decodes and not given:
            inputs["decoder_input_ids"] = _decoder_inputs(_base_model(model), labels["labels"])
        return labels, inputs


def per_sample_loss_for(model: nn.Module, *, label_smoothing: float = 0.0) -> HeadLoss:
    """Finds the per-sample loss of a model by the name of its class, or of the nearest parent class.

    Wrappers of other libraries are looked into (``get_base_model``). A child
    class whose own loss differs from its parent's is found out by
    :func:`check_against_model_loss`.

    Raises:
        ConfigurationError: If ``label_smoothing`` is not in [0, 1).
        UnsupportedOperationError: If the head has no per-sample loss here.
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigurationError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1).")
    base = _base_model(model)
    known = head_of_class()
    head = next((known[c.__name__] for c in type(base).__mro__ if c.__name__ in known), None)
    class_name = type(base).__name__
    if head is not None and head.decodes and not getattr(base.config, "is_encoder_decoder", False):
        head = CAUSAL_LM
    if head is None:
        raise UnsupportedOperationError(
            f"{class_name}: no per-sample loss is known for this head. Known are: "
            f"{', '.join(h.name for h in HEADS)}. {WAY_OUT}"
        )
    if label_smoothing and not head.smoothable:
        raise ConfigurationError(
            f"{class_name} ({head.name}): this head's targets are not smoothed. Set label_smoothing_factor to 0."
        )
    return HeadLoss(head=head, class_name=class_name, label_smoothing=label_smoothing)


def inside(context: Callable[[], AbstractContextManager[Any]], loss: PerSampleLoss) -> PerSampleLoss:
    """Returns the loss computed inside a context, such as autocast, made anew for each call."""

    def wrapped(model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
        with context():
            return loss(model, micro_batch)

    return wrapped


def _base_model(model: nn.Module) -> Any:
    """The model of transformers inside a wrapper such as PEFT's."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _virtual_tokens(model: nn.Module) -> int:
    """How many positions a PEFT prompt adds before the tokens; 0 without one."""
    return int(getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0)


def _decoder_inputs(base: Any, labels_BT: Tensor) -> Tensor:
    """The labels shifted right, as the model itself would do when handed the labels."""
    prepare = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        shifted: Tensor = prepare(labels=labels_BT)
        return shifted
    start, pad = base.config.decoder_start_token_id, base.config.pad_token_id
    if start is None or pad is None:
        raise ConfigurationError(
            f"{type(base).__name__}: config.decoder_start_token_id is {start} and config.pad_token_id is "
            f"{pad}. Set both, or add decoder_input_ids in the data collator."
        )
    shifted = F.pad(labels_BT[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == IGNORED_LABEL, pad)


def check_against_model_loss(
    model: nn.Module,
    micro_batch: Mapping[str, Any],
    head_loss: HeadLoss,
    *,
    relative_tolerance: float | None = None,
) -> None:
    """Compares the per-sample losses with the loss the model computes itself, on real samples.

    Guarantee: on return, the per-sample losses, averaged over the micro-batch as
    the head does, equal the model's own loss in evaluation mode. This catches a
    missing or surplus shift, another target, and extra terms (router balance,
    z-loss). Training modes are restored; gradients are not touched.

    Args:
        model: On the same device as the micro-batch.
        micro_batch: Collated samples with labels, at least one target among them.
        head_loss: What :func:`per_sample_loss_for` returned.
        relative_tolerance: Default 1e-4, and 1e-2 where logits have 16 bits.

    Raises:
        CertificateError: If the two differ.
        UnsupportedOperationError: If the model computes no scalar loss.
        ConfigurationError: If no sample has a target.
    """
    unsmoothed = dataclasses.replace(head_loss, label_smoothing=0.0)
    place = f"{head_loss.class_name} ({head_loss.head.name})"
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            terms = unsmoothed.terms(model, micro_batch, as_model=True)
            outputs = model(**micro_batch)
    finally:
        for module, training in modes:
            module.training = training
    if not bool(terms.counts_BG.sum(0).all()):
        raise ConfigurationError(
            f"{place}: none of the {len(terms.counts_BG)} samples looked at has a target. Check that the data "
            "collator leaves labels, or look at more samples."
        )
    own = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if not isinstance(own, Tensor) or own.numel() != 1:
        raise UnsupportedOperationError(
            f"{place}: the model computes no scalar loss to check against. {WAY_OUT}"
        )
    own_loss, our_loss = float(own), float(terms.batch_loss)
    narrow = torch.finfo(terms.dtype).bits < 32
    tolerance = relative_tolerance if relative_tolerance is not None else (1e-2 if narrow else 1e-4)
    # Not "difference > bound": a NaN must not pass.
    if not abs(own_loss - our_loss) <= tolerance * max(abs(own_loss), 1e-3):
        raise CertificateError(
            f"{place}: the per-sample losses average to {our_loss:.6g}, the model's own loss is {own_loss:.6g}. "
            "It may add a batch-coupled term (for routed experts set config.output_router_logits = False), "
            f"or read the labels otherwise. {WAY_OUT}"
        )


@dataclass(frozen=True, kw_only=True)
class CustomLoss:
    """A user's own loss as a :data:`PerSampleLoss`.

    Guarantee: the result has shape (B,), one loss a sample. That each entry
    depends on its own sample alone is the user's word, which the certificate checks.

    Args:
        compute_loss_func: As the Trainer's, ``(outputs, labels, num_items_in_batch=None)``, returning (B,).
    """

    compute_loss_func: Callable[..., Any]

    def __call__(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
        """Runs the model without labels and returns the user's losses, (B,)."""
        inputs = dict(micro_batch)
        labels = inputs.pop("labels", None)
        # num_items_in_batch counts the neighbours' targets: a loss divided by it couples samples.
        losses = self.compute_loss_func(model(**inputs), labels, num_items_in_batch=None)
        samples = next(len(v) for v in micro_batch.values() if isinstance(v, Tensor) and v.dim())
        if not isinstance(losses, Tensor) or losses.shape != (samples,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigurationError(
                f"compute_loss_func returned {shape} for {samples} samples; it must return one loss a sample, "
                f"of shape ({samples},). A mean over the micro-batch couples its samples: one sample could then "
                "change the gradient of every other, and clipping would no longer bound what it contributes. "
                "Use reduction='none' and average over each sample's own targets."
            )
        return losses


def custom_loss(compute_loss_func: Callable[..., Any]) -> CustomLoss:
    """Wraps a Trainer's ``compute_loss_func`` that returns one loss a sample, (B,)."""
    return CustomLoss(compute_loss_func=compute_loss_func)
