"""One case of the zoo: a head of a model type, from its configuration to an outcome.

The engine is held against one sample at a time on the same padded samples. Where
the two differ, plain autograd alone decides whose fault it is: if the gradient of
the summed losses is not the sum of the samples' own gradients, the model couples
its samples, no per-sample gradient exists, and the certificate must refuse it.
"""

from __future__ import annotations

import functools
import inspect
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from dp_trainer import (
    CertificateError,
    ConfigurationError,
    FlatClipping,
    UnsupportedOperationError,
    certify,
    clipped_gradient_sum,
    freeze_batch_norm,
)
from dp_trainer.batch_norm import is_frozen
from dp_trainer.batches import split_micro_batch
from dp_trainer.gradients.certificate import without_padding
from dp_trainer.gradients.independence import check_independence, repeatable
from dp_trainer.losses import check_against_model_loss, per_sample_loss_for

from .configs import toy_config
from .heads import CLASSES, HEADS, Batch, PerSampleLoss, head_loss
from .inputs import LOSSES, batch_for
from .overrides import fields_of

TOLERANCE = 1e-3
MOST_PARAMETERS = 5_000_000
_SMALLEST_SHARE = 1e-2
REFUSALS = (CertificateError, ConfigurationError, UnsupportedOperationError)
OUTCOMES = ("exact", "refused", "wrong", "error", "not buildable")


@dataclass(frozen=True)
class Case:
    """A head of a model type."""

    head: str
    model_type: str

    def __str__(self) -> str:
        return f"{self.model_type}-{self.head.replace(' ', '-')}"


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        case: The case.
        verdict: One of ``OUTCOMES``.
        reason: Why, unless exact.
        error: Largest relative difference from one sample at a time, where compared.
        own_loss: Whether the package has no per-sample loss that is this model's, so that a user must pass one.
        reached: The share of parameters that any sample has a gradient for.
        frozen: The number of batch normalizations that keep the statistics they came with.
        padding: Whether padding changes a sample's loss, so that a padded micro-batch is refused.
    """

    case: Case
    verdict: str
    reason: str = ""
    error: float = float("nan")
    own_loss: bool = False
    reached: float = 1.0
    frozen: int = 0
    padding: bool = False


def all_cases() -> list[Case]:
    return [
        Case(head.name, model_type)
        for head in HEADS.values()
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{head.table}_MAPPING_NAMES")
    ]


def model_class(case: Case) -> Any:
    names = getattr(modeling_auto, f"MODEL_FOR_{HEADS[case.head].table}_MAPPING_NAMES")[case.model_type]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def build(case: Case) -> tuple[nn.Module, Batch, PerSampleLoss]:
    """The toy model in training mode without dropout, its micro-batch and its loss."""
    torch.manual_seed(0)
    random.seed(0)
    fields = fields_of(case.model_type, case.head)
    if "classification" in case.head:
        fields["num_labels"] = CLASSES
    made_of = model_class(case)
    config = _config_for(made_of, toy_config(case.model_type, fields))
    model = made_of(config).float()
    size = sum(p.numel() for p in model.parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters are no toy; add sizes to the table of fields")
    # Initial scales of one, biases and gates of zero would hide mistakes.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    _freeze_batch_norm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    batch = batch_for(case.model_type, case.head, config, torch.Generator().manual_seed(1))
    taken = inspect.signature(model.forward).parameters
    if "attention_mask" in batch and "attention_mask" not in taken:
        del batch["attention_mask"]
    # What a user would pass, where the package has no loss.
    return model.train(), batch, LOSSES.get((case.model_type, case.head), head_loss)


def _freeze_batch_norm(model: nn.Module) -> None:
    """As for training, with statistics that differ from those of a new model, which change nothing."""
    freeze_batch_norm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)


def _config_for(made_of: Any, config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a composite configuration that the class is made of, as transformers' own auto classes do."""
    parts = (getattr(config, name, None) for name in config.sub_configs)
    if isinstance(config, made_of.config_class):
        return config
    return next((part for part in parts if isinstance(part, made_of.config_class)), config)


def _seeded(loss: PerSampleLoss, model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
    """The same random draws in every forward pass, for models that draw any."""
    torch.manual_seed(2)
    random.seed(2)
    return loss(model, micro_batch)


def run(case: Case) -> Outcome:
    """Builds the case and compares; never raises for what the model or the engine does."""
    try:
        model, batch, loss = build(case)
        loss(model, batch).sum()
    except REFUSALS as error:
        return Outcome(case, "refused", _told(error))
    except Exception as error:  # noqa: BLE001 - whatever stops a model from being built is the finding
        return Outcome(case, "not buildable", _told(error))
    try:
        own_loss = loss is not head_loss or not _agrees_with_the_models_loss(model, batch)
        return _compare(case, model, batch, functools.partial(_seeded, loss), own_loss=own_loss)
    except REFUSALS as error:
        return Outcome(case, "refused", _told(error))
    except Exception as error:  # noqa: BLE001 - an unexplained error is the finding
        return Outcome(case, "error", _told(error))


def _agrees_with_the_models_loss(model: nn.Module, batch: Batch) -> bool:
    """Whether the trainer would take its own per-sample loss for this model's."""
    try:
        check_against_model_loss(model, batch, per_sample_loss_for(model))
    except REFUSALS:
        return False
    return True


def _compare(case: Case, model: nn.Module, batch: Batch, loss: PerSampleLoss, *, own_loss: bool) -> Outcome:
    norms_B = clipped_gradient_sum(
        model, [batch], per_sample_loss=loss, clipping=FlatClipping(1.0), strategy="book_keeping"
    ).norms
    # Between the two in the middle: some samples are clipped, some are not.
    clipping = FlatClipping(max(float(norms_B.sort().values[len(norms_B) // 2 - 1 :][:2].mean()), 1e-9))
    engine, reference = (
        clipped_gradient_sum(model, [batch], per_sample_loss=loss, clipping=clipping, strategy=strategy)
        for strategy in ("book_keeping", "loop")
    )
    if not reference.norms.any() or not torch.isfinite(reference.norms).all():
        return Outcome(case, "not buildable", f"norms of {reference.norms.tolist()} show nothing")
    norm_error = float(((engine.norms - reference.norms).abs() / reference.norms.clamp(min=1e-9)).max())
    apart = differences(engine.gradients, reference.gradients)
    error = _largest([norm_error, *apart.values()])
    # Asked so that NaN does not pass.
    if not error <= TOLERANCE:
        worst = max(apart, key=lambda name: apart[name])
        return Outcome(case, *_explained(worst, model, batch, loss), error=error)
    return Outcome(
        case,
        "exact",
        error=error,
        own_loss=own_loss,
        reached=sum(bool(g.any()) for g in reference.gradients.values()) / len(reference.gradients),
        frozen=sum(map(is_frozen, model.modules())),
        padding=_padding_matters(model, batch, loss),
    )


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative difference of each parameter's tensor.

    Relative to the parameter's own norm, with a floor of one hundredth of the whole, so that what is lost
    of a small parameter does not hide behind the large ones.
    """
    sizes = {name: float(tensor.norm()) for name, tensor in second.items()}
    # Not zero: where no sample alone has a gradient, any gradient at all is a difference.
    floor = max(_SMALLEST_SHARE * sum(size**2 for size in sizes.values()) ** 0.5, 1e-12)
    return {name: float((first[name] - second[name]).norm()) / (sizes[name] + floor) for name in sizes}


def _largest(values: Iterable[float]) -> float:
    """The largest value, or NaN where there is one, which Python's own max may pass over."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def _explained(worst: str, model: nn.Module, batch: Batch, loss: PerSampleLoss) -> tuple[str, str]:
    """Verdict and reason of a disagreement that is furthest in parameter ``worst``."""
    coupling = samples_coupled(model, batch, loss)
    if coupling <= TOLERANCE:
        with repeatable(model):
            check_independence(model, batch, loss)
        caught = "refuses it" if _certificate_refuses(model, batch, loss) else "lets it through"
        return (
            "wrong",
            f"{worst}: autograd keeps the samples apart, the engine errs; the certificate {caught}",
        )
    # Raises, and so counts as refused, or lets a coupled model through.
    certify(model, batch, per_sample_loss=loss, clipping=FlatClipping(1.0), strategy="book_keeping")
    return "wrong", f"{worst}: couples its samples ({coupling:.2g}), and the certificate lets it through"


def _certificate_refuses(model: nn.Module, batch: Batch, loss: PerSampleLoss) -> bool:
    try:
        certify(model, batch, per_sample_loss=loss, clipping=FlatClipping(1.0), strategy="book_keeping")
    except CertificateError:
        return True
    return False


def samples_coupled(model: nn.Module, batch: Batch, loss: PerSampleLoss) -> float:
    """How far the gradient of the summed losses is from the sum of the samples' gradients, by autograd."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradient(micro_batch: Mapping[str, Any]) -> dict[str, Tensor]:
        grads = torch.autograd.grad(
            loss(model, micro_batch).sum(), list(parameters.values()), allow_unused=True
        )
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(parameters.items(), grads, strict=True)
        }

    apart = [gradient(sample) for sample in split_micro_batch(batch)]
    total = {name: sum(g[name] for g in apart) for name in parameters}
    return _largest(differences(gradient(batch), total).values())


def _padding_matters(model: nn.Module, batch: Batch, loss: PerSampleLoss) -> bool:
    with torch.no_grad():
        pairs = [
            (loss(model, sample), loss(model, without_padding(sample))) for sample in split_micro_batch(batch)
        ]
    return any(not torch.allclose(padded, cut, rtol=TOLERANCE, atol=1e-4) for padded, cut in pairs)


def _told(error: BaseException) -> str:
    # Addresses would make each run's page another one.
    text = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")
    return re.sub(r"\s+", " ", text)[:400]
