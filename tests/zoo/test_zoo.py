"""Thirty architectures of the zoo, chosen so that every head and every kind of parameter use is among them."""

import dataclasses
import os
import time

import pytest
import torch
from torch import nn

from dp_trainer import CertificateError, ConfigurationError, UnsupportedOperationError
from dp_trainer.losses import per_sample_loss_for

from . import __main__ as zoo
from . import compare
from .compare import Case, Outcome, all_cases, build, run, samples_coupled
from .configs import VOCABULARY, toy_config
from .heads import HEADS
from .report import coverage_page, reasons, totals

CHOSEN = (
    Case("causal LM", "bloom"),
    Case("causal LM", "deepseek_v3"),
    Case("causal LM", "falcon"),
    Case("causal LM", "gemma3_text"),
    Case("causal LM", "gpt2"),
    Case("causal LM", "gptj"),
    Case("causal LM", "jamba"),
    Case("causal LM", "llama"),
    Case("causal LM", "mamba"),
    Case("causal LM", "mixtral"),
    Case("causal LM", "mpt"),
    Case("causal LM", "opt"),
    Case("causal LM", "phi3"),
    Case("causal LM", "qwen3_next"),
    Case("masked LM", "albert"),
    Case("masked LM", "modernbert"),
    Case("masked LM", "roberta"),
    Case("seq2seq LM", "bart"),
    Case("seq2seq LM", "t5"),
    Case("sequence classification", "qwen2"),
    Case("sequence classification", "deberta-v2"),
    Case("token classification", "electra"),
    Case("question answering", "distilbert"),
    Case("multiple choice", "bert"),
    Case("image classification", "beit"),
    Case("image classification", "convnext"),
    Case("image classification", "vit"),
    Case("video classification", "videomae"),
    Case("audio classification", "audio-spectrogram-transformer"),
    Case("speech seq2seq", "moonshine_streaming"),
)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_agrees_with_one_sample_at_a_time(case):
    outcome = run(case)
    assert outcome.verdict == "exact", f"{outcome.reason} (error {outcome.error:.2g})"


def test_chosen_are_thirty_types():
    assert len({case.model_type for case in CHOSEN}) == 30
    assert set(CHOSEN) <= set(all_cases())


def test_every_case_of_the_auto_mappings_is_listed_once():
    cases = all_cases()
    assert len(cases) == len(set(cases)) > 600
    assert {case.head for case in cases} == set(HEADS)


BERT = Case("sequence classification", "bert")
RESNET = Case("image classification", "resnet")


def test_batch_norm_is_exact_only_when_frozen(monkeypatch):
    outcome = run(RESNET)
    assert outcome.verdict == "exact"
    assert outcome.frozen > 3
    monkeypatch.setattr(compare, "_freeze_batch_norm", lambda model: None)
    outcome = run(RESNET)
    assert outcome.verdict == "refused"
    assert "batch" in outcome.reason


def test_frozen_batch_norm_is_run_with_statistics_that_matter():
    model, batch, loss = build(RESNET)
    given = loss(model, batch)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
            module.running_var.fill_(1.0)
    assert (loss(model, batch) - given).abs().max() > 1e-2


def test_a_loss_that_is_not_the_models_is_marked(monkeypatch):
    assert not run(BERT).own_loss
    assert run(Case("seq2seq LM", "prophetnet")).own_loss
    monkeypatch.setattr(
        compare, "check_against_model_loss", lambda *_: (_ for _ in ()).throw(CertificateError("planted"))
    )
    assert run(BERT).own_loss


@pytest.mark.parametrize(("case", "needs"), [
    (Case("question answering", "lxmert"), "'start_positions'"),
    (Case("image classification", "pp_lcnet"), "'logits'"),
    (Case("video classification", "videoprism_vision_model"), "logits must have shape"),
    (Case("speech seq2seq", "dia"), "'labels'"),
], ids=str)  # fmt: skip
def test_a_head_that_is_not_as_its_table_says_is_refused_by_name(case, needs):
    model, batch, _ = build(case)
    with pytest.raises((ConfigurationError, UnsupportedOperationError), match=needs) as error:
        per_sample_loss_for(model)(model, batch)
    assert type(model).__name__ in str(error.value)
    assert "compute_loss_func" in str(error.value)


def _faulty(monkeypatch, spoil):
    honest = compare.clipped_gradient_sum

    def dishonest(*args, strategy, **kwargs):
        result = honest(*args, strategy=strategy, **kwargs)
        return spoil(result) if strategy == "book_keeping" else result

    monkeypatch.setattr(compare, "clipped_gradient_sum", dishonest)


def _lost_parameter(result):
    name = next(name for name in result.gradients if name.endswith("dense.weight"))
    gradients = {**result.gradients, name: torch.zeros_like(result.gradients[name])}
    return dataclasses.replace(result, gradients=gradients)


def _lost_bias(result):
    """Of a parameter that hardly counts."""
    name = min(
        result.gradients, key=lambda n: result.gradients[n].norm() if n.endswith("value.bias") else 1e9
    )
    gradients = {**result.gradients, name: torch.zeros_like(result.gradients[name])}
    return dataclasses.replace(result, gradients=gradients)


def _one_norm_off(result):
    return dataclasses.replace(result, norms=result.norms * torch.tensor([1.0, 1.0, 1.01, 1.0]))


def _nan(result):
    return dataclasses.replace(result, norms=result.norms * torch.tensor([1.0, float("nan"), 1.0, 1.0]))


@pytest.mark.parametrize("spoil", [_lost_parameter, _lost_bias, _one_norm_off, _nan])
def test_inexact_engine_is_called_wrong(monkeypatch, spoil):
    assert run(BERT).verdict == "exact"
    _faulty(monkeypatch, spoil)
    assert run(BERT).verdict == "wrong"


def test_unexplained_error_is_called_error(monkeypatch):
    def broken(result):
        raise RuntimeError("planted")

    _faulty(monkeypatch, broken)
    outcome = run(BERT)
    assert (outcome.verdict, outcome.reason) == ("error", "RuntimeError: planted")


class _Coupled(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.linear, self.share = nn.Linear(3, 3), share

    def forward(self, data):
        hidden = self.linear(data)
        return hidden - self.share * hidden.mean(0, keepdim=True)


@pytest.mark.parametrize(("share", "coupled"), [(0.0, False), (0.01, True), (1.0, True)])
def test_coupled_samples_are_told_by_plain_autograd(share, coupled):
    batch = {"data": torch.randn(4, 3)}

    def loss(model, micro_batch):
        return model(micro_batch["data"]).square().sum(1)

    assert (samples_coupled(_Coupled(share), batch, loss) > compare.TOLERANCE) == coupled


def test_shrinking_keeps_one_layer_of_each_kind_and_sub_configs():
    hybrid = toy_config("qwen3_next", {})
    assert hybrid.layer_types == ["linear_attention", "full_attention"]
    assert hybrid.num_hidden_layers == 2
    assert toy_config("t5gemma", {}).encoder.vocab_size == VOCABULARY
    assert toy_config("bert", {"hidden_size": 48}).hidden_size == 48


def test_toys_train_without_dropout_and_with_perturbed_weights():
    model, batch, _ = build(BERT)
    assert model.training
    assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
    assert all(p.std() > 0 for p in model.parameters())
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 4


def _quick(case):
    if case.model_type == "gpt2":
        time.sleep(30)
    if case.model_type == "t5":
        os._exit(3)
    return Outcome(case, "exact")


def test_a_case_that_hangs_or_kills_its_process_stops_nothing_else(monkeypatch):
    monkeypatch.setattr(zoo, "run", _quick)
    cases = [Case(head, kind) for kind in ("gpt2", "t5", "bert") for head in ("causal LM", "masked LM")]
    outcomes = {str(o.case): o for o in zoo.run_all(cases, jobs=2, limit_s=2.0)}
    verdicts = {name: outcome.verdict for name, outcome in outcomes.items()}
    assert verdicts == {
        "gpt2-causal-LM": "error",
        "gpt2-masked-LM": "error",
        "t5-causal-LM": "error",
        "t5-masked-LM": "error",
        "bert-causal-LM": "exact",
        "bert-masked-LM": "exact",
    }
    assert "2 s" in outcomes["gpt2-causal-LM"].reason
    assert "3" in outcomes["t5-causal-LM"].reason


def test_page_names_every_case_and_counts_them():
    outcomes = [
        Outcome(Case("causal LM", "gpt2"), "exact", padding=True, reached=0.5),
        Outcome(Case("causal LM", "llama"), "exact", frozen=2),
        Outcome(Case("masked LM", "bert"), "refused", "CertificateError: a|b"),
        Outcome(Case("CTC", "wav2vec2"), "not buildable", "ImportError: none"),
    ]
    page = coverage_page(outcomes)
    assert "exact 66.7% of the 3 buildable; not buildable 25.0% of 4" in totals(outcomes)
    assert "| causal LM | 2 | 0 | 0 | 0 | 0 |" in page
    assert "gpt2§‡, llama*" in page
    assert "exact 2 (of which 1 with frozen batch normalization), refused 1" in page
    assert "| masked LM | bert | CertificateError: a\\|b |" in page
    assert "bert-" in reasons(outcomes)
