"""A run small enough to be audited in seconds."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers import TrainingArguments

from dp_trainer import DPTrainer, PrivacyArguments
from dp_trainer.audit.arguments import AuditArguments

SAMPLES = 600
WORDS = 20


class Bag(nn.Module):
    """Classifies by the mean of word vectors; some parameters are never used."""

    def __init__(self, *, unused: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=dict)
        self.words = nn.Embedding(WORDS, 4)
        self.head = nn.Linear(4, 2)
        self.unused = nn.Parameter(torch.zeros(unused))

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        return {"logits": self.head((self.words(input_ids) * mask).sum(1) / mask.sum(1))}


def loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")


def collate(samples):
    longest = max(len(sample["input_ids"]) for sample in samples)
    padded = {
        key: torch.tensor([sample[key] + [0] * (longest - len(sample[key])) for sample in samples])
        for key in ("input_ids", "attention_mask")
    }
    return {**padded, "labels": torch.tensor([sample["labels"] for sample in samples])}


def data(samples: int = SAMPLES):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(samples):
        length = 2 + index % 9
        ids = torch.randint(0, WORDS, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": index % 2})
    return rows


def toy_run(folder, *, unused: int = 20_000, samples: int = SAMPLES, **privacy) -> DPTrainer:
    torch.manual_seed(0)
    settings = {"noise_multiplier": 1.0, "target_delta": 1e-4, "expected_batch_size": samples // 4, **privacy}
    if settings.get("sampling") == "full_batch":
        del settings["expected_batch_size"]
    return DPTrainer(
        model=Bag(unused=unused),
        args=TrainingArguments(
            str(folder),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            max_steps=8,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        train_dataset=data(samples),
        data_collator=collate,
        compute_loss_func=loss,
        privacy=PrivacyArguments(**settings),
    )


def effort(**changes) -> AuditArguments:
    """What the table of faults is made with."""
    return AuditArguments(**{
        "audit_noise_entries": 400_000,
        "audit_draws": 400,
        "audit_releases": 600,
        "audit_step_canaries": 32,
        "audit_canaries": 500,
        **changes,
    })  # fmt: skip
