"""One cell of the table: a method on a model, from wrapping to an outcome."""

from __future__ import annotations

import random
import re
import warnings
from dataclasses import dataclass
from typing import Any

import reference
import torch
from torch import Tensor, nn

from dp_trainer import CertificateError, ConfigurationError, FlatClipping, UnsupportedOperationError
from dp_trainer.batches import select
from dp_trainer.gradients.certificate import certify
from dp_trainer.gradients.strategies import clipped_gradient_sum
from dp_trainer.losses import check_against_model_loss, per_sample_loss_for

from .methods import MODELS, Method

TOLERANCE = 1e-6
# What PEFT raises for a model that a method does not fit.
_ABSENCES = (AttributeError, KeyError, NotImplementedError, TypeError, ValueError)
# One sample alone, too: with one, data and constants have the same leading axis.
_MICRO_BATCHES = ([0, 1, 2, 3], [4])


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        verdict: exact, refused, not in PEFT or wrong.
        reason: Why, unless exact.
        error: The largest relative error, where compared.
        by_loop: Whether it is refused for want of a rule only, so that ``strategy="loop"`` trains it.
    """

    verdict: str
    reason: str = ""
    error: float = float("nan")
    by_loop: bool = False


def build(method: Method, title: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The wrapped toy model in training mode, float64, without dropout, and its micro-batch."""
    case = MODELS[title]
    torch.manual_seed(0)
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about defaults and tied tables
        model = method.wrap(title, case.build()).double().train()
    # Matrices that start at zero would hide what lies behind them.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.micro_batch().items()}
    return model, {**batch, **method.columns}


def run(method: Method, title: str) -> Outcome:
    """Builds a cell and compares it with one sample at a time."""
    try:
        model, batch = build(method, title)
    except ConfigurationError as error:
        return Outcome("refused", _first_sentence(error))
    except _ABSENCES:
        # Only where the table says so: anything else is a fault of ours.
        if title not in method.absent:
            raise
        return Outcome("not in PEFT", method.absent[title])
    if title in method.absent:
        return Outcome(
            "wrong", f"the table says that PEFT lacks it ({method.absent[title]}), and it was built"
        )
    loss = per_sample_loss_for(model)
    try:
        check_against_model_loss(model, batch, loss)
        error, unclipped = _largest_error(model, batch, loss)
        if not error <= TOLERANCE:
            certify(model, batch, per_sample_loss=loss, clipping=FlatClipping(1.0), strategy="book_keeping")
            return Outcome("wrong", "disagrees with one sample at a time, and the certificate passes", error)
    except UnsupportedOperationError as refusal:
        return Outcome("refused", _first_sentence(refusal), by_loop=_passes_by_loop(model, batch, loss))
    except (CertificateError, ConfigurationError) as refusal:
        return Outcome("refused", _first_sentence(refusal))
    if not 0 < unclipped < len(batch["labels"]):
        return Outcome("wrong", "some samples must be clipped and some must not be", error)
    return Outcome("exact", error=error)


def _passes_by_loop(model: nn.Module, batch: dict[str, Tensor], loss: Any) -> bool:
    try:
        certify(model, batch, per_sample_loss=loss, clipping=FlatClipping(1.0), strategy="loop")
    except CertificateError:
        return False
    return True


def _largest_error(model: nn.Module, batch: dict[str, Tensor], loss: Any) -> tuple[float, int]:
    """The larger relative error of norms and clipped sum; how many samples were not clipped."""
    expected = reference.per_sample_gradients(model, batch, loss)
    norms_B = reference.norms(expected)
    middle = norms_B.sort().values[len(norms_B) // 2 :][:2]
    clipping = FlatClipping(float(middle.log().mean().exp()))
    actual = clipped_gradient_sum(
        model,
        [select(batch, rows) for rows in _MICRO_BATCHES],
        per_sample_loss=loss,
        clipping=clipping,
        strategy="book_keeping",
    )
    # Relative to the largest norm for samples whose own gradient is nothing but rounding.
    scale_B = norms_B.clamp(min=1e-9 * float(norms_B.max()))
    errors = [
        float(((actual.norms.double() - norms_B).abs() / scale_B).max()),
        reference.distance(actual.gradients, reference.clipped_sum(expected, actual.factors)),
    ]
    # Also relative to each parameter, so that a small one does not hide among large ones.
    for name, total in reference.clipped_sum(expected, actual.factors).items():
        size = float(sum(sample[name].double().norm() for sample in expected))
        if size > 1e-9 * float(norms_B.max()):
            errors.append(float((actual.gradients[name].double() - total).norm()) / size)
    worst = max(errors) if all(e == e for e in errors) else float("nan")
    return worst, int((actual.factors > 1 - 1e-9).sum())


def _first_sentence(error: Exception) -> str:
    """The error's class and first sentence, without measured numbers and the second and further parameters."""
    text = str(error).split("\n")[0]
    text = re.sub(r"(: |^)([\w.]+\.[\w.]+)(, [\w.]+\.[\w.]+)+: ", r"\1\2, …: ", text)
    text = re.sub(r"-?\d+\.\d+(e-?\d+)?", "…", text)
    text = re.split(r"(?<=[a-z\])])\. (?=[A-Z])", text)[0].rstrip(".")
    return f"{type(error).__name__}: {text}"
