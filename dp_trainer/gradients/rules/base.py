"""What an operation rule is, and the table of rules.

A rule handles one torch function that meets a trainable parameter (or a tensor
derived from one) together with sample data. It runs the operation on the
parameters' plain values, and says of which form each parameter's per-sample
gradient is, given the output's gradient::

    @operation_rule(F.linear)
    def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(input, call.value(weight), call.value(bias))
        inputs_BTD = call.by_sample(input)
        return call.watch(
            output,
            (weight, lambda grad: OuterProduct(call.by_sample(grad), inputs_BTD)),
            (bias, lambda grad: Materialized(call.by_sample(grad).sum(1))),
        )

A rule holds no privacy logic and computes no norms. The plain value has no
autograd link, so the ordinary weight gradient is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from dp_trainer.gradients.forms import Form

FormMaker = Callable[[Tensor], Form]
Rule = Callable[..., Any]
_AnyRule = TypeVar("_AnyRule", bound=Rule)

OPERATION_RULES: dict[Callable[..., Any], Rule] = {}


class Call(Protocol):
    """One intercepted call, as a rule sees it. ``capture`` implements it."""

    @property
    def batch_size(self) -> int:
        """Number of samples in the micro-batch."""

    def is_tracked(self, value: object) -> bool:
        """Whether the value is a trainable parameter or derived from one."""

    @property
    def sample_axis(self) -> int:
        """The axis of the data that runs over the samples."""

    def repeats_batch(self, tensor: Tensor) -> bool:
        """Whether the forward pass gave a tracked tensor a first axis that may run over the samples."""

    def is_data(self, value: object) -> bool:
        """Whether the value is a tensor that may hold sample data."""

    def value(self, argument: Any) -> Any:
        """The argument without its autograd link to parameters; anything else unchanged."""

    def watch(self, output: Tensor, *uses: tuple[Tensor | None, FormMaker]) -> Tensor:
        """Records each use's form when the gradient of ``output`` arrives; returns the output.

        Uses whose tensor is not tracked are left out.
        """

    def by_sample(self, tensor: Tensor) -> Tensor:
        """The detached tensor as (B, T, last axis); its first axis must be sample-major."""

    def sum_by_sample(self, tensor: Tensor) -> Tensor:
        """The detached tensor's rows added up for each sample, (B, …)."""

    def samples(self, tensor: Tensor) -> list[Tensor]:
        """The tensor's own rows of each sample, B tensors, with their autograd links."""

    def copies(self, tensor: Tensor) -> list[Tensor]:
        """One copy of a tracked tensor for each sample; what arrives at copy b is sample b's gradient."""

    def own_places(self, tensor: Tensor, axis: int) -> Tensor:
        """A tracked tensor with an axis over the samples; what arrives there is each sample's gradient."""

    def per_sample_copy(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A tracked tensor expanded over the samples, ready to broadcast to ``shape``."""

    def derive(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function of parameters and constants; its result stays tracked."""

    def refuse(self, reason: str) -> NoReturn:
        """Raises ``UnsupportedOperationError`` for this call."""


def operation_rule(*functions: Callable[..., Any]) -> Callable[[_AnyRule], _AnyRule]:
    """Registers a rule for torch functions, in each spelling that reaches the function mode.

    A rule takes the call and then the function's own arguments under their own
    names, so that a misread argument fails instead of being dropped.

    Raises:
        ValueError: If one of the functions already has a rule.
    """

    def register(rule: _AnyRule) -> _AnyRule:
        for function in functions:
            if function in OPERATION_RULES:
                raise ValueError(f"{torch.overrides.resolve_name(function)} already has a rule")
            OPERATION_RULES[function] = rule
        return rule

    return register
