"""Private training of a small head, step by step what ``DPTrainer`` does.

Every update is one call of ``dp_trainer.release.release``: the engine's norms and sums, the
package's clipping functions, sampler, noise and plan. Only the Trainer around it is left out, which
would cost more than such small steps; ``batch`` holds the two against each other.

Noise and draws have fixed keys, so that runs which differ in one setting see the same draws and the
same noise and can be compared to the last digit. **Whoever knows the keys can remove the noise: these
runs are not private.** ε is what the same run with secret keys would spend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from ablations.features import Split
from dp_trainer import ClippingFunction, ConfigurationError, PrivacyArguments
from dp_trainer.gradients.certificate import LARGEST_EXCESS
from dp_trainer.privacy.noise import NoiseGenerator
from dp_trainer.privacy.plan import PrivacyPlan, make_plan
from dp_trainer.privacy.sampling import FullBatchSampler, PoissonSampler, insecure_key
from dp_trainer.release import release

DELTA = 1e-5
# Small enough beside the root of any second moment here to leave no trace in float32.
NEARLY_ZERO = 1e-20


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the optimizer is built.

    Args:
        optimizer: A name in ``OPTIMIZERS``.
        learning_rate: Constant over the run.
        weight_decay: Coupled (added to the gradient) or decoupled, as the optimizer has it.
        stability: The ε in the denominators of Adam, AdamW and AdaGrad; None takes torch's.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float = 0.0
    stability: float | None = None


Build = Callable[[Iterable[nn.Parameter], Recipe], Optimizer]


def _adaptive(kind: type[Optimizer], usual: float) -> Build:
    def build(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
        settings: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        return kind(parameters, eps=usual if recipe.stability is None else recipe.stability, **settings)

    return build


def _descent(momentum: float) -> Build:
    def build(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
        return SGD(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, momentum=momentum)

    return build


OPTIMIZERS: Mapping[str, Build] = {
    "SGD": _descent(0.0),
    "SGD with momentum": _descent(0.9),
    "Adam": _adaptive(Adam, 1e-8),
    "AdamW": _adaptive(AdamW, 1e-8),
    "AdaGrad": _adaptive(Adagrad, 1e-10),
}


class Head(nn.Module):
    """Logits of fixed features: linear, or with one layer of tanh units.

    Args:
        width: Features D.
        classes: Logits.
        hidden: Units of the layer between; 0 for a linear head, which starts at zero.
        seed: Fixes the initial weights.
    """

    def __init__(self, *, width: int, classes: int, hidden: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.output = nn.Linear(hidden or width, classes)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if self.hidden is not None:
            generator = torch.Generator().manual_seed(seed)
            nn.init.zeros_(self.hidden.bias)
            for layer in (self.hidden, self.output):
                nn.init.xavier_normal_(layer.weight, generator=generator)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Returns ``{"logits": (B, classes)}``."""
        inner = features if self.hidden is None else torch.tanh(self.hidden(features))
        return {"logits": self.output(inner)}


def losses_of(outputs: Mapping[str, Tensor], labels: Tensor, **unused: Any) -> Tensor:
    """One cross entropy a sample, (B,); has the form of the Trainer's ``compute_loss_func``."""
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")


def per_sample_loss(model: nn.Module, micro_batch: Mapping[str, Tensor]) -> Tensor:
    """The same for the engine."""
    return losses_of(model(micro_batch["features"]), micro_batch["labels"])


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a run left behind.

    Args:
        head: The trained head.
        weights: All parameters as one float64 vector.
        clipped: Share of the drawn samples whose gradient was shortened, one entry a step.
    """

    head: Head
    weights: Tensor
    clipped: list[float]


@functools.cache
def plan_for(*, rows: int, batch: int, steps: int, epsilon: float) -> PrivacyPlan:
    """The package's plan for this many samples, noise calibrated to ε; a batch of all rows means full batches."""
    full = batch == rows
    arguments = PrivacyArguments(
        target_epsilon=epsilon,
        target_delta=DELTA,
        sampling="full_batch" if full else "poisson",
        expected_batch_size=None if full else batch,
        insecure_noise_seed=0,
    )
    return make_plan(arguments, dataset_size=rows, expected_batch_size=batch, steps=steps)


def with_clipping(plan: PrivacyPlan, clipping: ClippingFunction) -> PrivacyPlan:
    """The plan with another clipping function; ε depends on the noise multiplier alone."""
    return replace(plan, clipping=clipping)


def without_noise(plan: PrivacyPlan) -> PrivacyPlan:
    """The plan with no noise, hence no privacy."""
    return replace(plan, noise_multiplier=0.0, epsilon=math.inf)


def train(
    data: Split,
    head: Head,
    *,
    plan: PrivacyPlan,
    recipe: Recipe,
    seed: int,
    steps: int | None = None,
    optimizers: Mapping[str, Build] = OPTIMIZERS,
    watch: Callable[[int, Head], None] = lambda step, head: None,
) -> Run:
    """Trains the head in place.

    Guarantee: each step is one ``release`` of the plan on one draw of the package's sampler, its
    result handed to the optimizer and nothing else. Equal seeds draw equal samples and equal
    standard normal noise.

    Args:
        data: The samples.
        head: The model to train.
        plan: The run's numbers.
        recipe: The optimizer's settings.
        seed: Fixes noise and draws.
        steps: Steps to take; those of the plan if None.
        optimizers: Builders by name.
        watch: Called after each step with the number of steps taken.

    Raises:
        ConfigurationError: If the plan is for another number of samples, or the optimizer is unknown.
    """
    if plan.dataset_size != len(data):
        raise ConfigurationError(
            f"train: the plan is for {plan.dataset_size} samples, there are {len(data)}. Plan for these."
        )
    if recipe.optimizer not in optimizers:
        raise ConfigurationError(f"optimizer={recipe.optimizer!r}. Choose one of {', '.join(optimizers)}.")
    optimizer = optimizers[recipe.optimizer](head.parameters(), recipe)
    noise = NoiseGenerator(device="cpu", insecure_seed=seed)
    verified: set[Any] = set()
    clipped = []
    for step, (features, labels) in enumerate(_draws(data, plan, steps or plan.steps, seed), start=1):
        report = release(
            head,
            [{"features": features, "labels": labels}] if len(labels) else [],
            per_sample_loss=per_sample_loss,
            plan=plan,
            noise=noise,
            strategy="automatic",
            rounding_margin=LARGEST_EXCESS,
            verified=verified,
        )
        optimizer.step()
        clipped.append(report.clipped_fraction)
        watch(step, head)
    weights = torch.cat([parameter.detach().flatten() for parameter in head.parameters()]).double()
    return Run(head=head, weights=weights, clipped=clipped)


def _draws(data: Split, plan: PrivacyPlan, steps: int, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    """The logical batches of a run."""
    if plan.sampling == "full_batch":
        for _ in FullBatchSampler(dataset_size=len(data), steps=steps):
            yield data.features, data.labels
        return
    sampler = PoissonSampler(
        dataset_size=len(data),
        sampling_probability=plan.sampling_probability,
        batch_cap=plan.batch_cap,
        steps=steps,
        key=insecure_key(seed),
    )
    for indices in sampler:
        chosen = torch.tensor(indices, dtype=torch.long)
        yield data.features[chosen], data.labels[chosen]


def accuracy(head: Head, data: Split) -> float:
    """Share of samples whose largest logit is at the label."""
    with torch.no_grad():
        return float((head(data.features)["logits"].argmax(1) == data.labels).double().mean())


def gradient_norm(head: Head, data: Split) -> float:
    """L2 norm of the mean loss's gradient over all samples, without clipping."""
    loss = per_sample_loss(head, {"features": data.features, "labels": data.labels}).mean()
    gradients = torch.autograd.grad(loss, list(head.parameters()))
    return float(torch.cat([gradient.flatten().double() for gradient in gradients]).norm())


def distance(first: Tensor, second: Tensor) -> float:
    """Relative L2 distance of two weight vectors, by the longer of the two; 0 for two zero vectors."""
    longest = float(torch.maximum(first.norm(), second.norm()))
    return float((first - second).norm()) / longest if longest else 0.0
