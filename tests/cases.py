"""Tables of toy models and micro-batches that the tests run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 61
BATCH = 5
LENGTH = 11
LENGTHS = (11, 3, 7, 5, 2)

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 4}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_T5 = {
    **_SEQ2SEQ,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
}
_BART = {
    **_SEQ2SEQ,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "forced_eos_token_id": 2,
}


@dataclass(frozen=True)
class ModelCase:
    """A toy transformers model: its class, its config, and what its batch looks like."""

    name: str
    model_class: str
    config: dict[str, Any]
    head: str

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model_class = getattr(transformers, self.model_class)
        model = model_class(model_class.config_class(**self.config))
        # Initial norms' scales of one and biases of zero would hide mistakes.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.to(dtype).train()

    def micro_batch(self, lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> dict[str, Tensor]:
        return HEAD_BATCHES[self.head](lengths, torch.Generator().manual_seed(seed))


def _tokens(lengths: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    longest = max(lengths)
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def _language_model(lengths: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    batch = _tokens(lengths, generator)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _masked_language_model(lengths: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    batch = _language_model(lengths, generator)
    hidden = torch.rand(batch["labels"].shape, generator=generator) < 0.5
    hidden[:, 0] = False
    return {**batch, "labels": batch["labels"].masked_fill(hidden, -100)}


def _classification(lengths: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    return {
        **_tokens(lengths, generator),
        "labels": torch.randint(0, 2, (len(lengths),), generator=generator),
    }


def _sequence_to_sequence(lengths: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    source = _tokens(lengths, generator)
    target = _language_model(tuple(reversed(lengths)), generator)
    return {**source, "labels": target["labels"]}


def _image(lengths: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(len(lengths), 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 3, (len(lengths),), generator=generator)}


HEAD_BATCHES: dict[str, Callable[[tuple[int, ...], torch.Generator], dict[str, Tensor]]] = {
    "causal": _language_model,
    "masked": _masked_language_model,
    "classification": _classification,
    "seq2seq": _sequence_to_sequence,
    "image": _image,
}

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "pad_token_id": 0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_DISTILBERT = {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "pad_token_id": 0,
               "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}  # fmt: skip
_GEMMA = {**_GROUPED, "query_pre_attn_scalar": 4, "sliding_window": 16}
_OPT = {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}
_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 16,
        "patch_size": 4, "num_labels": 3, **_NO_DROPOUT}  # fmt: skip

MODEL_CASES = (
    ModelCase("gpt2-tied", "GPT2LMHeadModel", _GPT2, "causal"),
    ModelCase("gpt2-untied", "GPT2LMHeadModel", {**_GPT2, "tie_word_embeddings": False}, "causal"),
    ModelCase("gpt2-classifier", "GPT2ForSequenceClassification", _GPT2, "classification"),
    ModelCase("roberta-masked-tied", "RobertaForMaskedLM", {**_SIZES, **_NO_DROPOUT}, "masked"),
    ModelCase(
        "roberta-classifier", "RobertaForSequenceClassification", {**_SIZES, **_NO_DROPOUT}, "classification"
    ),
    ModelCase("bert-masked-tied", "BertForMaskedLM", {**_SIZES, **_NO_DROPOUT}, "masked"),
    ModelCase(
        "bert-classifier", "BertForSequenceClassification", {**_SIZES, **_NO_DROPOUT}, "classification"
    ),
    ModelCase("distilbert-masked-tied", "DistilBertForMaskedLM", _DISTILBERT, "masked"),
    ModelCase("distilbert-classifier", "DistilBertForSequenceClassification", _DISTILBERT, "classification"),
    ModelCase("llama-tied", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}, "causal"),
    ModelCase("llama-untied", "LlamaForCausalLM", _GROUPED, "causal"),
    ModelCase("qwen2-tied", "Qwen2ForCausalLM", {**_GROUPED, "tie_word_embeddings": True}, "causal"),
    ModelCase("qwen3-tied", "Qwen3ForCausalLM", {**_GROUPED, "tie_word_embeddings": True}, "causal"),
    ModelCase("gemma2-tied", "Gemma2ForCausalLM", {**_GEMMA, "tie_word_embeddings": True}, "causal"),
    ModelCase("gemma3-tied", "Gemma3ForCausalLM", {**_GEMMA, "tie_word_embeddings": True}, "causal"),
    ModelCase("mistral", "MistralForCausalLM", _GROUPED, "causal"),
    ModelCase("gpt-neox", "GPTNeoXForCausalLM", {**_SIZES, "attention_dropout": 0.0}, "causal"),
    ModelCase("opt-tied", "OPTForCausalLM", _OPT, "causal"),
    ModelCase("t5-tied", "T5ForConditionalGeneration", {**_T5, "dropout_rate": 0.0}, "seq2seq"),
    ModelCase("bart-tied", "BartForConditionalGeneration", {**_BART, "dropout": 0.0}, "seq2seq"),
    ModelCase("vit", "ViTForImageClassification", _VIT, "image"),
)
