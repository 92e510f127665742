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
from dp_trainer.gradients.certificate import certify, without_padding
from dp_trainer.heads import HEADS
from dp_trainer.losses import (
    HeadLoss,
    check_against_model_loss,
    custom_loss,
    per_sample_loss_for,
)
from dp_trainer.privacy.clipping import FlatClipping
from dp_trainer.terms import LossTerms

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
HEARING = {
    **TEXT, **WIDTH, "conv_dim": (8, 8), "conv_stride": (3, 2), "conv_kernel": (4, 3), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
HEARING_FEATURES = {**TEXT, **WIDTH, "feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3}
PARAKEET = {
    **TEXT,
    "encoder_config": {
        **WIDTH, "num_mel_bins": 8, "subsampling_conv_channels": 4, "subsampling_factor": 4, "conv_kernel_size": 3,
    },
}  # fmt: skip
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


def spoken():
    """Raw sound of 60, 41, 50 and 33 samples, and transcripts of other lengths, one of them empty."""
    mask_BT = torch.arange(60) < torch.tensor([60, 41, 50, 33])[:, None]
    labels_BT = targets()[:, :4]
    labels_BT[2] = -100
    return {
        "input_values": torch.randn(4, 60) * mask_BT,
        "attention_mask": mask_BT.long(),
        "labels": labels_BT,
    }


def spoken_features():
    sound = spoken()
    features = torch.randn(4, 60, 8) * sound["attention_mask"].unsqueeze(2)
    return {"input_features": features, "attention_mask": sound["attention_mask"], "labels": sound["labels"]}


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
    Case("CTC", "Wav2Vec2Config", HEARING, "Wav2Vec2ForCTC", spoken),
    Case("CTC", "HubertConfig", HEARING, "HubertForCTC", spoken, {"ctc_loss_reduction": "mean"}),
    Case("CTC", "Wav2Vec2BertConfig", HEARING_FEATURES, "Wav2Vec2BertForCTC", spoken_features),
    Case("CTC", "ParakeetCTCConfig", PARAKEET, "ParakeetForCTC", spoken_features),
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
    # A head's own span softmax runs over padding, and so is no model for a sample that has any.
    alone = without_padding if case.head == "question answering" else dict
    own_B = torch.stack([model(**alone(sample)).loss for sample in split_micro_batch(batch)])
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


SPANS = [case for case in CASES if case.head == "question answering"]


@pytest.mark.parametrize(
    ("case", "side"), [*((case, "right") for case in SPANS), (SPANS[0], "left")], ids=str
)
def test_padding_does_not_change_a_spans_loss_or_gradient(case, side):
    model, batch = case.build()
    model.eval()
    head_loss = per_sample_loss_for(model)
    padded = split_micro_batch(batch)[2]
    if side == "left":
        shift = int((padded["attention_mask"] == 0).sum())
        padded |= {name: padded[name].roll(shift, 1) for name in ("input_ids", "attention_mask")}
        padded |= {name: padded[name] + shift for name in head_loss.head.labels}
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    cut = without_padding(padded)
    assert cut["input_ids"].shape == (1, 3)
    for sample in (padded, cut):
        model.zero_grad()
        loss = head_loss(model, sample)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        if sample is padded:
            padded_loss, padded_gradient = loss, gradient
    torch.testing.assert_close(padded_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded_gradient, gradient, rtol=1e-4, atol=1e-6)
    assert (head_loss.terms(model, padded, as_model=True).per_sample - loss).abs() > 1e-2  # what is avoided


def test_padded_spans_pass_the_certificate():
    model, batch = SPANS[0].build()
    model.train()
    loss = per_sample_loss_for(model)
    assert certify(model, batch, per_sample_loss=loss, clipping=FlatClipping(1.0)).norm_error < 1e-4

    def over_padding(model, micro_batch):
        return loss.terms(model, micro_batch, as_model=True).per_sample

    with pytest.raises(CertificateError, match="padding"):
        certify(model, batch, per_sample_loss=over_padding, clipping=FlatClipping(1.0))


def test_a_span_in_padding_is_no_target():
    model, batch = SPANS[0].build()
    batch["end_positions"][3] = 4  # of a sample of two tokens
    terms = per_sample_loss_for(model).terms(model, batch)
    assert terms.counts_BG.tolist() == [[1, 1], [1, 1], [1, 1], [1, 0]]
    assert terms.sums_BG[3, 1] == 0
    assert (terms.per_sample < 100).all()
    check_against_model_loss(model, batch, per_sample_loss_for(model))


def test_a_sample_that_is_all_padding_has_loss_and_gradient_zero():
    model, batch = SPANS[0].build()
    batch["attention_mask"][1] = 0
    loss = per_sample_loss_for(model)(model, batch)[1]
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


CTC = [case for case in CASES if case.head == "CTC"]


@pytest.mark.parametrize("case", CTC, ids=str)
def test_frames_of_padding_do_not_count_for_a_transcript(case):
    model, batch = case.build()
    model.eval()
    head_loss = per_sample_loss_for(model)
    given = head_loss(model, batch)

    class Louder(nn.Module):
        """Whatever the logits of padding are: those after the frames that a sample of 33 has."""

        config = model.config

        def get_base_model(self):
            return model

        def forward(self, **inputs):
            outputs = model(**inputs)
            frames = outputs.logits.shape[1]
            outputs.logits[3, frames * 40 // 60 :] += 10 * torch.randn(VOCABULARY)
            return outputs

    torch.testing.assert_close(head_loss(Louder(), batch), given)
    unmasked = {name: value for name, value in batch.items() if name != "attention_mask"}
    assert (head_loss(model, unmasked) - given)[1:].abs().min() > 1e-3


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_transcripts_are_summed_or_averaged_as_configured(reduction):
    model, batch = CTC[0].build()
    model.eval()
    model.config.ctc_loss_reduction = "sum"
    summed_B = per_sample_loss_for(model)(model, batch)
    model.config.ctc_loss_reduction = reduction
    check_against_model_loss(model, batch, per_sample_loss_for(model))
    lengths_B = torch.tensor([2, 4, 1, 4]) if reduction == "mean" else torch.ones(4)
    torch.testing.assert_close(per_sample_loss_for(model)(model, batch), summed_B / lengths_B)


def test_labels_padded_with_the_blank():
    model, batch = CTC[0].build()
    model.eval()
    given = per_sample_loss_for(model)(model, batch)
    batch["labels"] = batch["labels"].clamp(min=model.config.pad_token_id)
    torch.testing.assert_close(per_sample_loss_for(model)(model, batch), given)


def test_a_transcript_longer_than_the_sound_hurts_that_sample_alone():
    model, batch = CTC[0].build()
    model.eval()
    given = per_sample_loss_for(model)(model, batch)
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 30), value=-100)
    batch["labels"][1] = 5
    losses_B = per_sample_loss_for(model)(model, batch)
    assert losses_B[1] == float("inf")
    torch.testing.assert_close(losses_B[[0, 2, 3]], given[[0, 2, 3]])
    model.config.ctc_zero_infinity = True
    assert per_sample_loss_for(model)(model, batch)[1] == 0


def _with(batch, **columns):
    return {**batch, **columns}


@pytest.mark.parametrize(("config", "change", "message"), [
    ({"pad_token_id": None}, dict, "pad_token_id, the blank, is None"),
    ({"pad_token_id": VOCABULARY}, dict, "pad_token_id, the blank, is 31"),
    ({"ctc_loss_reduction": "none"}, dict, "ctc_loss_reduction is 'none'"),
    ({}, lambda b: _with(b, labels=b["labels"].clamp(min=-100).masked_fill(b["labels"] > 9, 77)), "reach from .* to 77"),
    ({}, lambda b: _with(b, labels=b["labels"].masked_fill(b["labels"] > 9, -7)), "reach from -7"),
    ({}, lambda b: _with(b, labels=b["labels"][0]), "labels must have shape"),
    ({}, lambda b: _with(b, attention_mask=b["attention_mask"] * (torch.arange(60) < 3)), "shorter than one frame"),
])  # fmt: skip
def test_what_ctc_cannot_take_is_refused(config, change, message):
    model, batch = CTC[0].build()
    for name, value in config.items():
        setattr(model.config, name, value)
    with pytest.raises(ConfigurationError, match=message):
        per_sample_loss_for(model)(model.eval(), change(batch))


def test_unknown_counts_of_frames_are_refused():
    model, batch = CTC[0].build()

    class Silent(nn.Module):
        config = model.config

        def forward(self, **inputs):
            return model(**inputs)

    model.eval()
    head_loss = replace(per_sample_loss_for(model), class_name="Silent")
    with pytest.raises(UnsupportedOperationError, match=r"Silent.*how many frames"):
        head_loss(Silent(), batch)


def test_a_language_model_that_hears_predicts_the_next_token():
    """Transformers lists it beside encoder-decoders, but it has no decoder of its own that reads the labels."""
    settings = {
        "text_config": {"model_type": "qwen2", **LLAMA, "num_key_value_heads": 2},
        "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 8, "encoder_layers": 1,
                         "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 4},
        "audio_token_index": 30,
    }  # fmt: skip
    model, batch = Case(
        "", "Qwen2AudioConfig", settings, "Qwen2AudioForConditionalGeneration", causal
    ).build()
    head_loss = per_sample_loss_for(model)
    assert head_loss.head.name == "causal LM"
    check_against_model_loss(model, batch, head_loss)


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
