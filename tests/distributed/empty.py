"""Two processes whose shares of the draws are mostly empty, and a planted fault: empty shares are skipped.

    PYTHONPATH=tests torchrun --nproc-per-node 2 tests/distributed/empty.py RESULT.json

Rank 0 writes {which: [{what: number} of each rank]}.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cases import MODEL_CASES

from distributed.launch import leave
from dp_trainer import PrivacyArguments
from dp_trainer.batches import select
from dp_trainer.distributed import Ranks, sampler_of
from dp_trainer.losses import per_sample_loss_for
from dp_trainer.privacy.plan import make_plan
from dp_trainer.release import ALONE, release

STEPS, SAMPLES = 12, 5


def releases(ranks: Ranks, *, skip_empty: bool) -> dict[str, object]:
    """Makes the releases of some draws at q = 1/50; a rank that skips makes its own, or all would hang."""
    case = next(case for case in MODEL_CASES if case.name == "bert-classifier")
    model, micro_batch = case.build(), case.micro_batch()
    plan = make_plan(
        PrivacyArguments(noise_multiplier=1.0, target_delta=1e-3, dataset_size=50, accountant="rdp"),
        dataset_size=SAMPLES,
        expected_batch_size=1,
        steps=STEPS,
    )
    noise, sampler = ranks.noise_generator(), sampler_of(plan, range(SAMPLES), ranks, None)
    shares = [share for _, share in zip(range(STEPS), sampler, strict=False)]
    made = 0
    for share in shares:
        if skip_empty and not share:
            continue
        release(
            model,
            [select(micro_batch, share)] if share else [],
            per_sample_loss=per_sample_loss_for(model),
            plan=plan,
            noise=noise,
            strategy="book_keeping",
            rounding_margin=0.0,
            ranks=ALONE if skip_empty else ranks,
        )
        made += 1
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    largest = torch.cat([grad.flatten() for grad in grads])
    smallest = -largest
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(smallest, op=dist.ReduceOp.MAX)
    return {
        "steps": STEPS,
        "made": made,
        "empty": sum(not share for share in shares),
        "equal": torch.equal(largest, -smallest),
    }


def main(result: str) -> None:
    """Measures on all ranks, and writes."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    ranks, found = Ranks.current(torch.device("cpu")), {}
    for name, skip_empty in (("honest", False), ("skipping empty shares", True)):
        gathered: list[dict[str, object] | None] = [None] * ranks.size
        dist.all_gather_object(gathered, releases(ranks, skip_empty=skip_empty))
        found[name] = gathered
    if ranks.rank == 0:
        Path(result).write_text(json.dumps(found), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
