"""Peak memory of a rank over two steps, sharded or not, private or plain.

torchrun --nproc-per-node 2 tests/distributed/memory.py RESULT.json plain|private sharded|whole
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distributed.launch import leave
from dp_trainer import PrivacyArguments
from dp_trainer.distributed import Ranks
from dp_trainer.losses import per_sample_loss_for
from dp_trainer.privacy.plan import make_plan
from dp_trainer.release import release


def main(result: str, kind: str, way: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    ranks = Ranks.current(torch.device("cpu"))
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=12, n_embd=768, n_head=12, vocab_size=1024, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(3, 1024, (2, 48))
    batch = {"input_ids": ids, "labels": ids}
    if way == "sharded":
        mesh = init_device_mesh("cpu", (ranks.size,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    loss = per_sample_loss_for(model)
    plan = make_plan(
        PrivacyArguments(noise_multiplier=1.0, target_delta=1e-6),
        dataset_size=1000, expected_batch_size=2 * ranks.size, steps=1,
    )  # fmt: skip
    noise = ranks.noise_generator()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        if kind == "plain":
            model(**batch).loss.backward()
        else:
            release(
                model, [batch], per_sample_loss=loss, plan=plan, noise=noise, strategy="book_keeping",
                rounding_margin=0.0, ranks=ranks,
            )  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = [None] * ranks.size
    dist.all_gather_object(found, {"peak": peak / 2**20, "before": start / 2**20})
    if ranks.rank == 0:
        Path(result).write_text(json.dumps(found), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
