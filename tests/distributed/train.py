"""Trains a tiny model with ``DPTrainer`` on as many processes as it is launched with, and says what came out.

    PYTHONPATH=tests torchrun --nproc-per-node 2 tests/distributed/train.py SETTINGS.json

``SETTINGS`` has ``output_dir`` and ``result``; what else it may have is read below. Rank 0 writes the weights' digest, ε and counts to ``result``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import reference
import torch
import torch.distributed as dist
import transformers
from transformers import TrainerCallback, TrainingArguments

from distributed.launch import leave
from dp_trainer import DPTrainer, PrivacyArguments
from dp_trainer.distributed import leave_ranks


class Rows(torch.utils.data.Dataset):
    """Texts of unequal length with a label, the same on every rank."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(7)
        lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
        self.rows = [
            {
                "input_ids": torch.randint(5, 60, (length,), generator=generator).tolist(),
                "attention_mask": [1] * length,
                "labels": length % 2,
            }
            for length in lengths
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {
        key: torch.tensor([row[key] + [0] * (longest - len(row[key])) for row in rows])
        for key in ("input_ids", "attention_mask")
    }
    return {**padded, "labels": torch.tensor([row["labels"] for row in rows])}


def masking_collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Masks tokens by chance, by a generator that differs between ranks."""
    batch = collate(rows)
    hidden = torch.rand(batch["input_ids"].shape, generator=_CHANCE) < 0.3
    batch["input_ids"] = torch.where(hidden & (batch["attention_mask"] > 0), 4, batch["input_ids"])
    return batch


_CHANCE = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


class Fault(TrainerCallback):
    """Something that goes wrong on one rank, after some steps."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 3 or args.process_index != args.world_size - 1:
            return
        if self.kind == "a rank raises":
            raise RuntimeError("planted")
        if self.kind == "a rank dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "a rank gets SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def out_of_memory_on_one_rank():
    """The last rank has room for four samples at a time."""
    import dp_trainer.gradients.strategies as strategies

    original = strategies.STRATEGIES["book_keeping"]

    def tight(module, micro_batch, *rest):
        if dist.get_rank() == dist.get_world_size() - 1 and len(micro_batch["labels"]) > 4:
            raise torch.OutOfMemoryError("planted: out of memory")
        return original(module, micro_batch, *rest)

    strategies.STRATEGIES["book_keeping"] = tight
    try:
        yield
    finally:
        strategies.STRATEGIES["book_keeping"] = original


def fsdp2_on_cpu(args: TrainingArguments, settings: dict[str, Any]) -> None:
    """Lets accelerate shard on CPUs, which it offers for accelerators only."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    _ = args.device  # sets up the process group
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"],
        state_dict_type=settings.get("state_dict_type", "SHARDED_STATE_DICT"), cpu_ram_efficient_loading=False, activation_checkpointing=settings.get("checkpoints_activations", False),
    )  # fmt: skip
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_VERSION"] = "2"
    original = AcceleratorState.__init__

    def init(self, *positional, **named):
        named["fsdp_plugin"] = None
        original(self, *positional, **named)
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def main(settings: dict[str, Any]) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    args = TrainingArguments(
        output_dir=settings["output_dir"],
        per_device_train_batch_size=4,
        max_steps=settings.get("steps", 4),
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim=settings.get("optim", "sgd"),
        save_steps=settings.get("save_steps", 2),
        logging_steps=1,
        eval_strategy="steps" if settings.get("evaluates") else "no",
        eval_steps=1,
        eval_on_start=settings.get("evaluates", False),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    if settings.get("sharded"):
        fsdp2_on_cpu(args, settings)
    fault = settings.get("fault", "")
    rows = Rows(50 + (dist.get_rank() if fault == "ranks have different data" else 0))
    if fault == "a rank has another order" and args.process_index == 1:
        rows.rows.reverse()
    trainer = DPTrainer(
        model=model(),
        args=args,
        train_dataset=rows,
        data_collator=masking_collate if settings.get("masks") else collate,
        eval_dataset=Rows(8) if settings.get("evaluates") else None,
        callbacks=[Fault(fault)],
        privacy=PrivacyArguments(
            noise_multiplier=settings.get("noise_multiplier", 0.0),
            target_delta=1e-3,
            expected_batch_size=settings.get("expected_batch_size", 20),
            sampling=settings.get("sampling", "poisson"),
            certificate_samples=4,
        ),
    )
    if fault == "a handler on one rank" and args.process_index == 0:
        signal.signal(signal.SIGTERM, lambda *_: None)
    with out_of_memory_on_one_rank() if fault == "out of memory on one rank" else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=settings.get("resume"))
    weights = {name: reference.whole(p.detach()).double() for name, p in trainer.model.named_parameters()}
    trainer.save_model(str(Path(settings["output_dir"]) / "model"))
    if trainer.is_world_process_zero():
        torch.save(weights, Path(settings["result"]).with_suffix(".pt"))
        found = {
            "epsilon": trainer.accountant.epsilon,
            "steps_spent": trainer.accountant.steps_spent,
            "global_step": trainer.state.global_step,
            "type": type(trainer.model).__name__,
            "local share": sum(
                p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.model.parameters()
            ) / sum(p.numel() for p in trainer.model.parameters()),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }  # fmt: skip
        Path(settings["result"]).write_text(json.dumps(found), encoding="utf-8")


def gloo_threads() -> int:
    """How many of Gloo's threads run in this process, where Linux tells."""
    return sum(
        file.read_text().strip() == "pt_gloo_runloop" for file in Path("/proc/self/task").glob("*/comm")
    )


if __name__ == "__main__":
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    main(told)
    leave_ranks()
    assert told.get("sharded") or not gloo_threads(), "a group outlived the run, and with it its threads"
    leave()
