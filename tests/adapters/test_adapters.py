"""Methods of parameter-efficient fine-tuning: exact, or refused by name; and whole runs with them."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import torch
from cases import VOCABULARY
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from dp_trainer import DPTrainer, FlatClipping, PrivacyArguments
from dp_trainer.batches import select
from dp_trainer.gradients.strategies import clipped_gradient_sum
from dp_trainer.losses import per_sample_loss_for

from . import compare
from .compare import Outcome, build, run
from .methods import ASKED, MODELS, OTHERS, Method, lora, peft
from .page import peft_page, table_row

# PEFT asks transformers by a deprecated name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # SHiRA
]

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
METHODS = {method.name: method for method in (*ASKED, *OTHERS)}


@pytest.mark.parametrize(
    "method",
    [*ASKED, *(pytest.param(method, marks=pytest.mark.slow) for method in OTHERS)],
    ids=str,
)
def test_every_model_is_exact_or_refused_by_name(method):
    outcomes = [run(method, title) for title in MODELS]
    for title, outcome in zip(MODELS, outcomes, strict=True):
        if title in method.absent:
            assert outcome.verdict == "not in PEFT", (title, outcome)
        elif title in method.refused:
            assert outcome.verdict == "refused", (title, outcome)
            assert re.search(method.refused[title], outcome.reason), (title, outcome)
        else:
            assert outcome.verdict == "exact", (title, outcome)
    assert table_row(method, outcomes) in PAGE.read_text(encoding="utf-8").splitlines()


# The comparison itself.


def _faulty(monkeypatch, spoil):
    def dishonest(*args, **kwargs):
        return spoil(clipped_gradient_sum(*args, **kwargs))

    monkeypatch.setattr(compare, "clipped_gradient_sum", dishonest)


def _lost(ending):
    def spoil(result):
        name = next(n for n in result.gradients if n.endswith(ending))
        gradients = {**result.gradients, name: torch.zeros_like(result.gradients[name])}
        return dataclasses.replace(result, gradients=gradients)

    return spoil


def _one_norm_off(result):
    return dataclasses.replace(result, norms=result.norms * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0001]))


def _nan(result):
    return dataclasses.replace(result, norms=result.norms * torch.tensor([1.0, 1.0, 1.0, 1.0, float("nan")]))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("LoRA with its own bias", _lost("lora_B.default.bias")),
        ("LoRA with `trainable_token_indices`", _lost("trainable_tokens_delta.default")),
        ("LoRA", _one_norm_off),
        ("LoRA", _nan),
    ],
)
def test_an_inexact_engine_is_called_wrong(monkeypatch, name, spoil):
    _faulty(monkeypatch, spoil)
    assert run(METHODS[name], "GPT-2").verdict == "wrong"


def test_what_peft_cannot_build_is_told_from_what_is_refused():
    def broken(_title, _model):
        raise ValueError("no such layer")

    outcome = run(Method(name="broken", wrap=broken, absent={"ViT": "PEFT has none"}), "ViT")
    assert (outcome.verdict, outcome.reason) == ("not in PEFT", "PEFT has none")
    with pytest.raises(ValueError, match="no such layer"):
        run(Method(name="broken", wrap=broken), "ViT")


def test_the_page_holds_every_method_once_and_every_reason():
    outcomes = {(name, title): Outcome("exact") for name in METHODS for title in MODELS}
    outcomes["LoRA", "Llama"] = Outcome("not in PEFT", "no such layer")
    outcomes["LoRA", "RoBERTa"] = Outcome("refused", "OtherError: c", by_loop=True)
    outcomes["LoRA", "ViT"] = Outcome("refused", "SomeError: a|b")
    lines = peft_page(outcomes).splitlines()
    for name in METHODS:
        assert len([line for line in lines if line.startswith(f"| {name} | exact")]) == 1
    assert "| LoRA | exact | – no such layer | refused, but for `loop` | refused |" in lines
    assert "| LoRA | OtherError: c |" in lines


# What the table cannot show: dropout, and whole runs.


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_of_adapters_draws_one_mask_for_a_norm_and_its_gradient(use_dora):
    method = Method(name="dropout", wrap=lora(lora_dropout=0.5, use_dora=use_dora))
    model, batch = build(method, "Llama")
    norms = set()
    for _ in range(3):
        result = clipped_gradient_sum(
            model,
            [select(batch, [0])],
            per_sample_loss=per_sample_loss_for(model),
            clipping=FlatClipping(1e-3),
            strategy="book_keeping",
        )
        size = torch.stack([gradient.norm() for gradient in result.gradients.values()]).norm()
        assert float(size) == pytest.approx(1e-3, rel=1e-6)
        norms.add(float(result.norms[0]))
    assert len(norms) == 3


def _rows(samples: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(3, VOCABULARY, (3 + index % 5,), generator=generator)}
        for index in range(samples)
    ]


def _padded(samples: list[dict]) -> dict[str, torch.Tensor]:
    ids = nn.utils.rnn.pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _trainer(path, model, *callbacks, noise_multiplier=1.0) -> DPTrainer:
    return DPTrainer(
        model=model,
        args=TrainingArguments(
            str(path),
            per_device_train_batch_size=4,
            max_steps=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=_rows(),
        data_collator=_padded,
        callbacks=list(callbacks),
        privacy=PrivacyArguments(noise_multiplier=noise_multiplier, target_delta=1e-3, sampling="full_batch"),
    )


def _wrapped(name, title="GPT-2"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        return METHODS[name].wrap(title, MODELS[title].build())


@pytest.mark.parametrize("name", ["LoRA", "prompt tuning"])
def test_an_adapter_trains_is_saved_and_comes_back(tmp_path, name):
    model = _wrapped(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run_ = _trainer(tmp_path, model)
    run_.train()
    assert run_.state.global_step == run_.accountant.steps_spent == 2
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert 0 < len(moved) < len(before)

    run_.save_model(str(tmp_path / "adapter"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(MODELS["GPT-2"].build(), tmp_path / "adapter").eval()
    batch = _padded(_rows(4))
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits)


def test_ranks_are_allocated_from_noised_gradients(tmp_path):
    seen = []

    class Allocate(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.base_model.update_and_allocate(state.global_step)
            importance = model.base_model.rankallocator.ipt
            for name, parameter in model.base_model.model.named_parameters():
                if name in importance:
                    # Masked since, where the allocator cut a rank.
                    assert "lora_E" in name or torch.equal(
                        importance[name], (parameter * parameter.grad).abs()
                    )
                    seen.append(parameter.grad.clone())

    run_ = _trainer(tmp_path, _wrapped("AdaLoRA, `orth_reg_weight=0`"), Allocate(), noise_multiplier=1e4)
    run_.train()
    values = torch.cat([gradient.flatten() for gradient in seen])
    expected = 1e4 * run_.plan.clipping.sensitivity / run_.plan.divisor
    # What samples contribute is smaller by four orders of magnitude: only noise can have this size.
    assert float(values.std()) == pytest.approx(expected, rel=0.15)
    assert len(values) > 300
