"""Per-sample losses against each model's own loss, on one sample at a time and on the micro-batch."""

import warnings
from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers as tr
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from dp_trainer.batches import split_micro_batch
from dp_trainer.errors import CertificateError, ConfigurationError, UnsupportedOperationError
from dp_trainer.heads import HEADS, LossTerms
from dp_trainer.losses import (
    HeadLoss,
    check_against_model_loss,
    custom_loss,
    per_sample_loss_for,
)

VOCABULARY, CLASSES, LENGTH = 31, 5, 7
WIDTH = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {**TEXT, **WIDTH, "max_position_embeddings": 20}
GPT2 = {**TEXT, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 20}
LLAMA = {**TEXT, **WIDTH, "max_position_embeddings": 20}
BART = {
    **TEXT, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 20,
    "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    **TEXT, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
DISTIL = {**TEXT, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 20}
VIT = {**WIDTH, "image_size": 8, "patch_size": 4, "num_channels": 3}
OPT = {**TEXT, **WIDTH, "ffn_dim": 16, "word_embed_proj_dim": 8, "max_position_embeddings": 20}
RESNET = {
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "num_channels": 3,
    "layer_type": "basic",
}
WHISPER = {**BART, "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 20}
VIDEO = {**VIT, "num_frames": 2, "tubelet_size": 1}
AST = {**WIDTH, "num_mel_bins": 8, "max_length": 16, "patch_size": 4, "frequency_stride": 4, "time_stride": 4}


def token_inputs(*, rows=4):
    """Right-padded samples of 7, 5, 3 and 2 tokens."""
    input_ids_BT = torch.randint(3, VOCABULARY, (rows, LENGTH))
    mask_BT = torch.ones(rows, LENGTH, dtype=torch.long)
    for row, length in enumerate((7, 5, 3, 2)[:rows]):
        mask_BT[row, length:] = 0
    return {"input_ids": input_ids_BT * mask_BT, "attention_mask": mask_BT}


def causal():
    inputs = token_inputs()
    labels_BT = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels_BT[1, :2] = -100  # a prompt that is not learned
    return {**inputs, "labels": labels_BT}


def masked():
    inputs = token_inputs()
    labels_BT = torch.full((4, LENGTH), -100)
    for row, positions in enumerate(([0, 2, 5], [1], [0, 2], [1])):
        labels_BT[row, positions] = inputs["input_ids"][row, positions]
    return {**inputs, "labels": labels_BT}


def targets():
    labels_BT = torch.randint(3, VOCABULARY, (4, 5))
    for row, length in enumerate((2, 5, 1, 4)):
        labels_BT[row, length:] = -100
    return labels_BT


def encoder_decoder():
    return {**token_inputs(), "labels": targets()}


def tagged():
    inputs = token_inputs()
    labels_BT = torch.randint(0, CLASSES, (4, LENGTH))
    return {**inputs, "labels": labels_BT.masked_fill(inputs["attention_mask"] == 0, -100)}


def classified():
    inputs = token_inputs()
    # Encoder-decoder classifiers read the state at the end-of-text token.
    last_B = inputs["attention_mask"].sum(1) - 1
    inputs["input_ids"][torch.arange(4), last_B] = TEXT["eos_token_id"]
    return {**inputs, "labels": torch.tensor([0, 4, 2, 2])}


def multi_labelled():
    return {**classified(), "labels": torch.randint(0, 2, (4, CLASSES)).float()}


def regressed():
    return {**classified(), "labels": torch.randn(4)}


def many_regressed():
    return {**classified(), "labels": torch.randn(4, CLASSES)}


def spans():
    return {
        **token_inputs(),
        "start_positions": torch.tensor([0, 2, 1, 0]),
        "end_positions": torch.tensor([3, 4, 1, 1]),
    }


def choices():
    return {
        "input_ids": torch.randint(3, VOCABULARY, (4, 3, LENGTH)),
        "attention_mask": torch.ones(4, 3, LENGTH, dtype=torch.long),
        "labels": torch.tensor([0, 2, 1, 2]),
    }


def images():
    return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 4, 2, 2])}


def videos():
    return {"pixel_values": torch.randn(4, 2, 3, 8, 8), "labels": torch.tensor([0, 4, 2, 2])}


def sounds():
    return {"input_values": torch.randn(4, 16, 8), "labels": torch.tensor([0, 4, 2, 2])}


def speech():
    return {"input_features": torch.randn(4, 4, 12), "labels": targets()}


@dataclass(frozen=True)
class Case:
    head: str
    config: str
    settings: dict
    model: str
    batch: object
    overrides: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.model}-{self.batch.__name__}"

    def build(self):
        torch.manual_seed(0)
        config = getattr(tr, self.config)(**{**self.settings, **self.overrides})
        model = getattr(tr, self.model)(config)
        with torch.no_grad():  # initial logits are nearly uniform, which would hide a wrong target
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model, self.batch()


LABELS = {"num_labels": CLASSES}
CASES = [
    Case("causal LM", "GPT2Config", GPT2, "GPT2LMHeadModel", causal),
    Case("causal LM", "LlamaConfig", LLAMA, "LlamaForCausalLM", causal),
    Case("causal LM", "OPTConfig", OPT, "OPTForCausalLM", causal),
    Case("causal LM", "GPTNeoXConfig", LLAMA, "GPTNeoXForCausalLM", causal),
    Case("causal LM", "BertConfig", {**BERT, "is_decoder": True}, "BertLMHeadModel", causal),
    Case("unshifted causal LM", "BartConfig", BART, "BartForCausalLM", causal),
    Case("unshifted causal LM", "TrOCRConfig", BART, "TrOCRForCausalLM", causal),
    Case("seq2seq LM", "BartConfig", BART, "BartForConditionalGeneration", encoder_decoder),
    Case("seq2seq LM", "MBartConfig", BART, "MBartForConditionalGeneration", encoder_decoder),
    Case("seq2seq LM", "T5Config", T5, "T5ForConditionalGeneration", encoder_decoder),
    Case("seq2seq LM", "M2M100Config", BART, "M2M100ForConditionalGeneration", encoder_decoder),
    Case("speech seq2seq", "WhisperConfig", WHISPER, "WhisperForConditionalGeneration", speech),
    Case("masked LM", "BertConfig", BERT, "BertForMaskedLM", masked),
    Case("masked LM", "RobertaConfig", BERT, "RobertaForMaskedLM", masked),
    Case("masked LM", "DistilBertConfig", DISTIL, "DistilBertForMaskedLM", masked),
    Case("token classification", "BertConfig", BERT, "BertForTokenClassification", tagged, LABELS),
    Case("token classification", "GPT2Config", GPT2, "GPT2ForTokenClassification", tagged, LABELS),
    Case("token classification", "LlamaConfig", LLAMA, "LlamaForTokenClassification", tagged, LABELS),
    Case("sequence classification", "BertConfig", BERT, "BertForSequenceClassification", classified, LABELS),
    Case("sequence classification", "BertConfig", BERT, "BertForSequenceClassification", multi_labelled, LABELS),
    Case("sequence classification", "BertConfig", BERT, "BertForSequenceClassification", regressed, {"num_labels": 1}),
    Case("sequence classification", "RobertaConfig", BERT, "RobertaForSequenceClassification", many_regressed,
         {**LABELS, "problem_type": "regression"}),
    Case("sequence classification", "DistilBertConfig", DISTIL, "DistilBertForSequenceClassification", classified, LABELS),
    Case("sequence classification", "GPT2Config", GPT2, "GPT2ForSequenceClassification", classified, LABELS),
    Case("sequence classification", "GPTNeoXConfig", LLAMA, "GPTNeoXForSequenceClassification", classified, LABELS),
    Case("sequence classification", "LlamaConfig", LLAMA, "LlamaForSequenceClassification", regressed, {"num_labels": 1}),
    Case("sequence classification", "OPTConfig", OPT, "OPTForSequenceClassification", classified, LABELS),
    Case("sequence classification", "T5Config", T5, "T5ForSequenceClassification", classified, LABELS),
    Case("sequence classification", "BartConfig", BART, "BartForSequenceClassification", classified, LABELS),
    Case("question answering", "BertConfig", BERT, "BertForQuestionAnswering", spans),
    Case("question answering", "LlamaConfig", LLAMA, "LlamaForQuestionAnswering", spans),
    Case("question answering", "GPT2Config", GPT2, "GPT2ForQuestionAnswering", spans),
    Case("multiple choice", "BertConfig", BERT, "BertForMultipleChoice", choices),
    Case("multiple choice", "RobertaConfig", BERT, "RobertaForMultipleChoice", choices),
    Case("image classification", "ViTConfig", VIT, "ViTForImageClassification", images, LABELS),
    Case("image classification", "ResNetConfig", RESNET, "ResNetForImageClassification", images, LABELS),
    Case("video classification", "VideoMAEConfig", VIDEO, "VideoMAEForVideoClassification", videos, LABELS),
    Case("audio classification", "ASTConfig", AST, "ASTForAudioClassification", sounds, LABELS),
]  # fmt: skip
BY_NAME = {str(case): case for case in CASES}
GPT2_CASE = BY_NAME["GPT2LMHeadModel-causal"]
BERT_CLASSES = BY_NAME["BertForSequenceClassification-classified"]


def test_every_head_of_the_table_has_a_case():
    assert {head.name for head in HEADS} == {case.head for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_are_the_models_own_on_each_sample_alone(case):
    model, batch = case.build()
    head_loss = per_sample_loss_for(model)
    assert head_loss.head.name == case.head
    model.eval()
    losses_B = head_loss(model, batch)
    own_B = torch.stack([model(**sample).loss for sample in split_micro_batch(batch)])
    torch.testing.assert_close(losses_B, own_B, rtol=1e-5, atol=1e-5)
    assert losses_B.shape == (4,)
    assert losses_B.std() > 1e-3  # samples that all agree would hide an exchange


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_agree_with_the_micro_batchs_own_loss(case):
    model, batch = case.build()
    model.train()
    check_against_model_loss(model, batch, per_sample_loss_for(model))
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_samples_gradient_ignores_its_neighbours_labels(case):
    """The whole point: changing or removing other samples' targets leaves a sample's loss alone."""
    model, batch = case.build()
    model.eval()
    head_loss = per_sample_loss_for(model)
    losses_B = head_loss(model, batch)
    changed = dict(batch)
    for name in head_loss.head.labels:
        changed[name] = torch.cat([batch[name][:1], torch.ones_like(batch[name][1:])])
        if changed[name].dim() == 2 and not changed[name].is_floating_point():
            changed[name][1:, 1:] = -100
    torch.testing.assert_close(head_loss(model, changed)[0], losses_B[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel-causal", "BertForMaskedLM-masked", "BertForQuestionAnswering-spans"]
)
def test_a_sample_without_targets_has_loss_and_gradient_zero(name):
    model, batch = BY_NAME[name].build()
    head_loss = per_sample_loss_for(model)
    for label in head_loss.head.labels:
        batch[label][2] = LENGTH + 3 if "positions" in label else -100
    losses_B = head_loss(model, batch)
    assert losses_B[2] == 0
    assert (losses_B[[0, 1, 3]] > 0).all()
    losses_B[2].backward()
    assert all((p.grad is None or (p.grad == 0).all()) for p in model.parameters())


def test_spans_out_of_range_as_transformers():
    model, batch = BY_NAME["BertForQuestionAnswering-spans"].build()
    batch["start_positions"] = torch.tensor([-3, 2, 40, 0])
    batch["end_positions"] = torch.tensor([3, 4, 40, 1])
    check_against_model_loss(model, batch, per_sample_loss_for(model))


def test_target_counts_are_per_sample():
    model, batch = GPT2_CASE.build()
    terms = per_sample_loss_for(model).terms(model, batch)
    assert terms.counts_BG.flatten().tolist() == [6, 3, 2, 1]


@pytest.mark.parametrize("name", ["GPT2LMHeadModel-causal", "T5ForConditionalGeneration-encoder_decoder",
                                  "BertForSequenceClassification-classified"])  # fmt: skip
def test_label_smoothing_as_transformers(name):
    model, batch = BY_NAME[name].build()
    model.eval()
    smoothed = per_sample_loss_for(model, label_smoothing=0.2)
    losses_B = smoothed(model, batch)
    for loss, sample in zip(losses_B, split_micro_batch(batch), strict=True):
        reference = LabelSmoother(epsilon=0.2)(
            model(**sample), sample["labels"], shift_labels=BY_NAME[name].head == "causal LM"
        )
        torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    assert (losses_B - per_sample_loss_for(model)(model, batch)).abs().min() > 1e-3
    check_against_model_loss(model, batch, smoothed)  # compares without smoothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_give_float32_losses(dtype):
    model, batch = GPT2_CASE.build()
    model.eval()
    reference_B = per_sample_loss_for(model)(model, batch)
    narrow = model.to(dtype)
    losses_B = per_sample_loss_for(narrow)(narrow, batch)
    assert losses_B.dtype == torch.float32
    torch.testing.assert_close(losses_B, reference_B, rtol=0.05, atol=0.05)
    check_against_model_loss(narrow, batch, per_sample_loss_for(narrow))


def test_float64_stays_float64():
    model, batch = GPT2_CASE.build()
    assert per_sample_loss_for(model)(model.double(), batch).dtype == torch.float64


def _unshifted(head_loss: HeadLoss) -> HeadLoss:
    masked_head = next(head for head in HEADS if head.name == "masked LM")
    return replace(head_loss, head=masked_head)


def _token_mean(head_loss: HeadLoss) -> HeadLoss:
    """The classic fault: every sample's sum divided by the micro-batch's mean count of targets."""
    honest = head_loss.head.terms

    def terms(outputs, labels, settings):
        right = honest(outputs, labels, settings)
        return LossTerms(right.sums_BG, torch.ones_like(right.counts_BG), right.dtype)

    return replace(head_loss, head=replace(head_loss.head, terms=terms))


@pytest.mark.parametrize("fault", [_unshifted, _token_mean])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel-causal", "LlamaForCausalLM-causal"])
def test_check_rejects_planted_faults(name, fault):
    model, batch = BY_NAME[name].build()
    with pytest.raises(CertificateError, match=r"causal LM|masked LM"):
        check_against_model_loss(model, batch, fault(per_sample_loss_for(model)))


def test_check_rejects_a_shift_where_the_model_does_not_shift():
    model, batch = BY_NAME["BartForCausalLM-causal"].build()
    shifted = replace(per_sample_loss_for(model), head=next(h for h in HEADS if h.name == "causal LM"))
    with pytest.raises(CertificateError, match="the model's own loss is"):
        check_against_model_loss(model, batch, shifted)


def test_check_rejects_a_router_loss():
    settings = {
        **LLAMA,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
    }
    model, batch = Case("", "MixtralConfig", settings, "MixtralForCausalLM", causal).build()
    with pytest.raises(CertificateError, match="output_router_logits = False"):
        check_against_model_loss(model, batch, per_sample_loss_for(model))
    model.config.output_router_logits = False
    check_against_model_loss(model, batch, per_sample_loss_for(model))


def test_check_restores_mixed_modes_after_an_error():
    model, batch = GPT2_CASE.build()
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(CertificateError):
        check_against_model_loss(model, batch, _token_mean(per_sample_loss_for(model)))
    assert [module.training for module in model.modules()] == modes


def test_check_wants_a_target():
    model, batch = GPT2_CASE.build()
    batch["labels"][:] = -100
    with pytest.raises(ConfigurationError, match="none of the 4 samples"):
        check_against_model_loss(model, batch, per_sample_loss_for(model))


def test_a_nan_does_not_pass_the_check():
    model, batch = GPT2_CASE.build()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(float("nan"))
    with pytest.raises(CertificateError):
        check_against_model_loss(model, batch, per_sample_loss_for(model))


@pytest.mark.parametrize(("config", "settings", "model"), [
    ("GPT2Config", GPT2, "GPT2DoubleHeadsModel"),
    ("GPT2Config", GPT2, "GPT2Model"),
    ("BertConfig", BERT, "BertForPreTraining"),
    ("BertConfig", BERT, "BertForNextSentencePrediction"),
])  # fmt: skip
def test_unknown_heads_are_refused_by_name(config, settings, model):
    with pytest.raises(UnsupportedOperationError, match=rf"{model}.*compute_loss_func.*\(B,\)"):
        per_sample_loss_for(getattr(tr, model)(getattr(tr, config)(**settings)))


def test_models_of_other_libraries_are_refused():
    with pytest.raises(UnsupportedOperationError, match="Linear"):
        per_sample_loss_for(nn.Linear(2, 2))


def test_a_subclass_is_known_by_its_parent():
    class Mine(tr.GPT2LMHeadModel):
        pass

    head_loss = per_sample_loss_for(Mine(tr.GPT2Config(**GPT2)))
    assert (head_loss.head.name, head_loss.class_name) == ("causal LM", "Mine")


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_peft_models_are_looked_into(kind):
    peft = pytest.importorskip("peft")
    model, batch = GPT2_CASE.build()
    settings = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about its defaults
        wrapped = peft.get_peft_model(model, settings[kind]())
        head_loss = per_sample_loss_for(wrapped)
        assert head_loss.head.name == "causal LM"
        check_against_model_loss(wrapped, batch, head_loss)
        wrapped.eval()
        losses_B = head_loss(wrapped, batch)
        own_B = torch.stack([wrapped(**sample).loss for sample in split_micro_batch(batch)])
    torch.testing.assert_close(losses_B, own_B, rtol=1e-5, atol=1e-5)


def _without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize(("case", "change", "message"), [
    (GPT2_CASE, _without_labels, r"needs the column 'labels', and the micro-batch has \['attention_mask'"),
    (GPT2_CASE, lambda b: {**b, "labels": b["labels"][:, :-1]}, "logits must have shape"),
    (GPT2_CASE, lambda b: {**b, "labels": b["labels"][:2]}, "logits must have shape"),
    (BERT_CLASSES, lambda b: {**b, "labels": torch.randint(0, 2, (4, CLASSES))}, "labels must have shape"),
    # (4,) against (4, 5) floats would broadcast if 4 were 5: never guess.
    (BERT_CLASSES, lambda b: {**b, "labels": torch.rand(4)}, "labels must have shape"),
    (BY_NAME["BertForSequenceClassification-regressed"], lambda b: {**b, "labels": torch.randn(4, 4)},
     "labels must have shape"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(case, change, message):
    model, batch = case.build()
    with pytest.raises(ConfigurationError, match=message):
        per_sample_loss_for(model)(model, change(batch))


def test_smoothing_is_refused_where_it_has_no_meaning():
    model, batch = BY_NAME["BertForSequenceClassification-regressed"].build()
    with pytest.raises(ConfigurationError, match="label smoothing"):
        per_sample_loss_for(model, label_smoothing=0.1)(model, batch)
    model, _ = BY_NAME["BertForQuestionAnswering-spans"].build()
    with pytest.raises(ConfigurationError, match="not smoothed"):
        per_sample_loss_for(model, label_smoothing=0.1)
    with pytest.raises(ConfigurationError, match=r"\[0, 1\)"):
        per_sample_loss_for(model, label_smoothing=1.5)


def test_the_models_own_loss_is_not_computed(monkeypatch):
    model, batch = GPT2_CASE.build()
    forward = type(model).forward
    seen = []

    def spy(self, *args, **kwargs):
        seen.append(kwargs.get("labels"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    per_sample_loss_for(model)(model, batch)
    assert seen == [None]
    assert "labels" in batch  # the caller's micro-batch is left alone


def _own_token_loss(outputs, labels, num_items_in_batch=None):
    assert num_items_in_batch is None
    losses = nn.functional.cross_entropy(
        outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
    )
    return losses.sum(1) / (labels[:, 1:] != -100).sum(1)


def test_custom_loss():
    model, batch = GPT2_CASE.build()
    model.eval()
    losses_B = custom_loss(_own_token_loss)(model, batch)
    torch.testing.assert_close(losses_B, per_sample_loss_for(model)(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [
    lambda losses: losses.mean(), lambda losses: losses.mean(0, keepdim=True), lambda losses: losses[:, None],
    lambda losses: losses.tolist(),
])  # fmt: skip
def test_custom_loss_must_return_one_loss_a_sample(wrong):
    model, batch = GPT2_CASE.build()

    def loss(outputs, labels, num_items_in_batch=None):
        return wrong(_own_token_loss(outputs, labels))

    with pytest.raises(ConfigurationError, match=r"of shape \(4,\).*couples its samples"):
        custom_loss(loss)(model, batch)
