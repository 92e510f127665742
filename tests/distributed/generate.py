"""What each process of a generation test does: writes with all ranks, and by itself, and leaves both in a file.

torchrun --nproc-per-node 2 tests/distributed/generate.py RESULT.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from distributed.launch import leave
from dp_trainer.distributed import Ranks
from dp_trainer.tasks.generation import Decoding, generate_texts

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16]]


class Letters:
    """The least a tokenizer must have here: token i is the i-th letter."""

    eos_token_id, pad_token_id = 0, None

    @staticmethod
    def batch_decode(texts, **settings):
        return ["".join(chr(0x100 + token) for token in text) for text in texts]


def built():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.6,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def texts_of(model, decoding):
    return generate_texts(model=model, tokenizer=Letters(), prompts=PROMPTS, decoding=decoding)


def alone(decoding):
    """What one process writes: no rank is asked for anything."""
    with patch.object(Ranks, "current", lambda device: Ranks(0, 1, device)):
        return texts_of(built(), decoding)


def main(path):
    dist.init_process_group("gloo")
    decoding = Decoding(num_beams=2, min_new_tokens=1, max_new_tokens=10, batch_size=2)
    # Three batches for two ranks: one of them has none in the last round.
    found = {"alone": alone(decoding), "replicated": texts_of(DistributedDataParallel(built()), decoding)}
    passes = []
    model = built()
    model.register_forward_hook(lambda *_: passes.append(1))
    # One batch for two ranks: the second has nothing to do.
    found["one batch"] = texts_of(model, replace(decoding, batch_size=8))
    found["passes"] = len(passes)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = built()
    for block in sharded.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded.train()
    found["sharded"] = texts_of(sharded, decoding)
    found["left sharded"] = all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    found["left training"] = all(module.training for module in sharded.modules())
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, found)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(shares), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
