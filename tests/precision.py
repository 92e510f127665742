"""Measures what low precision does to norms and contributions: ``python tests/precision.py --write docs/precision.md``.

A contribution is a sample's clip factor times its gradient, as it enters the sum.
Its norm may exceed the bound only as far as norm and sum round differently; both
are made in float32 from the same recorded tensors, whatever the model's dtype.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from cases import LENGTHS, MODEL_CASES, ModelCase
from pages import write_page

from dp_trainer import FlatClipping, clipped_gradient_sum
from dp_trainer.batches import split_micro_batch
from dp_trainer.gradients.certificate import LARGEST_EXCESS
from dp_trainer.losses import per_sample_loss_for

# Far below every gradient, so that every sample is clipped.
BOUND = 1e-3
MODES: dict[str, tuple[torch.dtype, Callable[[], contextlib.AbstractContextManager[object]]]] = {
    "float32": (torch.float32, contextlib.nullcontext),
    "bfloat16 autocast": (torch.float32, functools.partial(torch.autocast, "cpu", torch.bfloat16)),
    "bfloat16 model": (torch.bfloat16, contextlib.nullcontext),
}


def measure(case: ModelCase, mode: str, seeds: int = 5) -> tuple[torch.Tensor, float]:
    """Returns the norms of all samples, and the largest contribution over its bound, less one."""
    dtype, context = MODES[mode]
    norms, largest = [], -1.0
    for seed in range(seeds):
        model = case.build(dtype, seed=seed)
        loss = per_sample_loss_for(model)

        def in_mode(model, micro_batch, loss=loss):
            with context():
                return loss(model, micro_batch)

        for sample in split_micro_batch(case.micro_batch(LENGTHS, seed=seed + 1)):
            sample = {k: v.to(dtype) if v.is_floating_point() else v for k, v in sample.items()}
            one = clipped_gradient_sum(model, [sample], per_sample_loss=in_mode, clipping=FlatClipping(BOUND))
            total = torch.cat([g.double().flatten() for g in one.gradients.values()]).norm()
            norms.append(one.norms.double())
            largest = max(largest, float(total) / BOUND - 1)
    return torch.cat(norms), largest


def page() -> str:
    """Returns the table as Markdown."""
    lines = [
        "# Norms and contributions in low precision",
        "",
        "Toy models, 25 samples each, every one clipped. *Excess*: the largest norm of a contribution over the",
        f"bound, less one; extra noise covers at least {LARGEST_EXCESS:.0e}, or four times what the certificate finds.",
        "*Norms*: the samples' gradient norms against float32, smallest and largest ratio. They may differ, since",
        "bfloat16 computes another gradient; what is added is bounded by that gradient's own norm.",
        "",
        "| model | "
        + " | ".join(f"excess, {mode}" for mode in MODES)
        + " | norms, autocast | norms, model |",
        "| --- |" + " --- |" * 5,
    ]
    worst = dict.fromkeys(MODES, -1.0)
    for case in MODEL_CASES:
        measured = {mode: measure(case, mode) for mode in MODES}
        exact = measured["float32"][0]
        ratios = [measured[mode][0] / exact for mode in list(MODES)[1:]]
        cells = [f"{measured[mode][1]:.1e}" for mode in MODES]
        cells += [f"{float(ratio.min()):.3f} to {float(ratio.max()):.3f}" for ratio in ratios]
        lines.append(f"| {case.name} | {' | '.join(cells)} |")
        worst = {mode: max(worst[mode], measured[mode][1]) for mode in MODES}
    lines += [
        "",
        "Largest excess: " + ", ".join(f"{mode} {value:.1e}" for mode, value in worst.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_page(page, description=__doc__)
