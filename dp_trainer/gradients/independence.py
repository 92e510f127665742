"""Shows, without a reference, that what is recorded for one sample comes from that sample alone.

Turn the sign of some samples' losses and run the backward pass again: each
gradient recorded for sample b must turn with b's own sign, exactly, since
turning signs does not round. A row that belongs to another sample, or to
several, does not. This finds layouts whose first axis is not sample-major,
shuffled or gathered rows and losses that couple samples, for each use of each
parameter, however small its share of the norm.

Axes: B sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dp_trainer.batches import micro_batch_size
from dp_trainer.errors import CertificateError
from dp_trainer.gradients.capture import Use, capture
from dp_trainer.gradients.forms import Form
from dp_trainer.gradients.heap import give_back_freed_memory
from dp_trainer.gradients.measures import accumulation_dtype
from dp_trainer.gradients.parts import checked_losses
from dp_trainer.gradients.sharding import is_sharded

_DROPOUTS = frozenset(
    {
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        torch.dropout,
    }
)
# What draws by chance besides dropout functions, in modules and configurations, and its value without chance.
_CHANCES: dict[str, float | bool] = {
    **dict.fromkeys(("drop_prob", "layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
    "apply_spec_augment": False,
}
# Signs turn exactly; what is left is for kernels whose order of additions varies from run to run.
_TOLERANCE = 1e-2
_SEED = 0

# For one use of a parameter: a number per sample, and its scale, for each tensor of the form.
_Fingerprint = list[tuple[Tensor, Tensor]]


def check_independence(
    model: nn.Module,
    micro_batch: Mapping[str, Any],
    per_sample_loss: Callable[[nn.Module, Mapping[str, Any]], Tensor],
) -> set[Use]:
    """Returns the uses of parameters that were looked at; raises if a gradient recorded for one sample holds another sample's.

    Costs three forward and backward passes; keeps no gradients. Call it inside
    ``repeatable``. It cannot see a coupling whose gradient is exactly zero here.

    Raises:
        CertificateError: Naming the parameter.
    """
    size = micro_batch_size(micro_batch)
    # Ranks of a sharded model look together, those with one sample too.
    if size < 2 and not is_sharded(model):
        return set()
    generator = torch.Generator().manual_seed(_SEED)
    halves = torch.randperm(size, generator=generator) % 2
    alternating = torch.arange(size) % 2
    plain, uses_seen = _fingerprints(model, micro_batch, per_sample_loss, torch.ones(size))
    for pattern in (alternating, halves):
        signs_B = 1.0 - 2.0 * pattern
        turned, uses_again = _fingerprints(model, micro_batch, per_sample_loss, signs_B)
        # A use that not every pass had was not compared.
        uses_seen &= uses_again
        for name, uses in plain.items():
            if len(uses) != len(turned.get(name, ())) or not all(
                _turns(first, second, signs_B) for first, second in zip(uses, turned[name], strict=True)
            ):
                raise CertificateError(
                    f"{name}: the gradient recorded for a sample turns with its neighbours' losses, so it holds "
                    "their data. Usual causes: a layer whose first axis is not the sample axis, rows that are "
                    "gathered or reordered across samples, a loss that couples them. Set strategy='loop', or "
                    "freeze the parameter."
                )
    return uses_seen


def _fingerprints(
    model: nn.Module,
    micro_batch: Mapping[str, Any],
    per_sample_loss: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    signs_B: Tensor,
) -> tuple[dict[str, list[_Fingerprint]], set[Use]]:
    give_back_freed_memory()
    torch.manual_seed(_SEED)
    found: dict[str, list[_Fingerprint]] = {}

    def settle(name: str, form: Form) -> None:
        found.setdefault(name, []).append(_fingerprint(form))

    with capture(model, len(signs_B), settle=settle) as tape:
        losses_B = checked_losses(per_sample_loss(model, micro_batch), len(signs_B))
        if losses_B.requires_grad:
            (losses_B * signs_B.to(losses_B)).sum().backward()  # type: ignore[no-untyped-call]
    for name, forms in tape.take_forms().items():
        found.setdefault(name, []).extend(_fingerprint(form) for form in forms)
    return found, tape.uses


def _fingerprint(form: Form) -> _Fingerprint:
    """Linear in the form's tensors, so that it turns exactly as they do."""
    tensors = [t for t in vars(form).values() if isinstance(t, Tensor) and t.is_floating_point()]
    return [(_projected(t), torch.linalg.vector_norm(_rows(t), dim=1)) for t in tensors]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor)).reshape(tensor.shape[0], -1)


def _projected(tensor: Tensor) -> Tensor:
    rows = _rows(tensor)
    weights = torch.cos(torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype))
    return rows @ weights


def _turns(first: _Fingerprint, second: _Fingerprint, signs_B: Tensor) -> bool:
    """Whether exactly one tensor of the form follows the signs, and the others, data, stay."""
    followers = [_follows(a, b, signs_B) for a, b in zip(first, second, strict=True)]
    stayers = [_follows(a, b, torch.ones_like(signs_B)) for a, b in zip(first, second, strict=True)]
    return any(
        followers[turning] and all(stays for other, stays in enumerate(stayers) if other != turning)
        for turning in range(len(followers))
    )


def _follows(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], signs_B: Tensor) -> bool:
    (before_B, scale_B), (after_B, _) = first, second
    error_B = (after_B - signs_B.to(before_B) * before_B).abs()
    # A sample with NaN says nothing about the others and is left out of releases.
    return bool(((error_B <= _TOLERANCE * scale_B) | ~torch.isfinite(scale_B)).all())


@contextlib.contextmanager
def repeatable(model: nn.Module) -> Iterator[None]:
    """While inside, dropout is off, and the global generators and all buffers are restored afterwards.

    Raises:
        CertificateError: If a forward pass inside changed a buffer.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), _WithoutDropout(), _without_other_chance(model):
        yield
    changed = [name for name, buffer in model.named_buffers() if not _equal(buffer, buffers.get(name))]
    for name, buffer in model.named_buffers():
        if name in changed and name in buffers and buffer.shape == buffers[name].shape:
            with torch.no_grad():
                buffer.copy_(buffers[name])
    if changed:
        raise CertificateError(
            f"{changed[0]}: this buffer is updated from the samples in the forward pass, without noise, and is "
            "saved with the model. Replace the layer (GroupNorm or LayerNorm for BatchNorm)."
        )


@contextlib.contextmanager
def _without_other_chance(model: nn.Module) -> Iterator[None]:
    """While inside, no layer, path or stretch of sound is left out by chance."""
    changed: list[tuple[Any, str, Any]] = []
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for owner in (*model.modules(), *configs.values()):
        for name, certain in _CHANCES.items():
            value = getattr(owner, name, None)
            if isinstance(value, float | bool) and value:
                changed.append((owner, name, value))
                setattr(owner, name, certain)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _equal(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and buffer.shape == before.shape and torch.equal(buffer, before)


class _WithoutDropout(TorchFunctionMode):
    """Runs every dropout function with probability zero."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs.update(zip(("attn_mask", "dropout_p", "is_causal"), args[3:6], strict=False))
            kwargs["dropout_p"] = 0.0
            args = args[:3]
        return func(*args, **kwargs)
