"""The table: methods of parameter-efficient fine-tuning, and how each toy model is wrapped in them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import BATCH, MODEL_CASES, VOCABULARY, ModelCase
from torch import Tensor, nn

from dp_trainer.tasks.models import choose_trainable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PEFT's own, about what transformers renamed
    import peft

_BY_NAME = {case.name: case for case in MODEL_CASES}
# A column of the table each. Both language models are tied: a method that touches a tied table is harder.
MODELS: dict[str, ModelCase] = {
    "GPT-2": _BY_NAME["gpt2-tied"],
    "Llama": _BY_NAME["llama-tied"],
    "RoBERTa": _BY_NAME["roberta-classifier"],
    "ViT": _BY_NAME["vit"],
}
_TASK_TYPES = {"GPT-2": "CAUSAL_LM", "Llama": "CAUSAL_LM", "RoBERTa": "SEQ_CLS"}

Wrap = Callable[[str, nn.Module], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Args:
        name: What it is called on the page.
        wrap: Takes the column's title and the toy model, returns the model to train.
        absent: Column → why PEFT itself does not do it on that model.
        refused: Column → what the refusal's message must contain, a regular expression.
        columns: What each sample must have besides the model's own inputs.
    """

    name: str
    wrap: Wrap
    absent: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def _config(title: str, make: str, settings: Mapping[str, Any]) -> Any:
    """A config of PEFT; a setting keyed by the columns' titles is looked up there."""
    # A copy, since PEFT adds the head's name to the caller's own list.
    chosen = {
        key: copy.deepcopy(value[title] if isinstance(value, dict) and title in value else value)
        for key, value in settings.items()
    }
    if title in _TASK_TYPES:
        chosen["task_type"] = _TASK_TYPES[title]
    return getattr(peft, make)(**chosen)


def adapter(make: str, **settings: Any) -> Wrap:
    """Wraps by one config of PEFT, given by its name so that an older PEFT may lack it."""
    return lambda title, model: peft.get_peft_model(model, _config(title, make, settings))


def trainable(*patterns: str) -> Wrap:
    """Trains the parameters whose names are found, as ``trainable`` of a task's YAML does."""

    def wrap(_title: str, model: nn.Module) -> nn.Module:
        choose_trainable(model, list(patterns))
        return model

    return wrap


LAYERS = {
    "GPT-2": ["c_attn", "c_proj", "c_fc"],
    "Llama": ["q_proj", "v_proj", "down_proj"],
    "RoBERTa": ["query", "value", "dense"],
    "ViT": ["q_proj", "v_proj", "fc1"],
}
# Layers of one shape, which methods with shared matrices ask for.
_EQUAL = {
    "GPT-2": ["attn.c_proj"],
    "Llama": ["v_proj"],
    "RoBERTa": ["query", "value"],
    "ViT": ["q_proj", "v_proj"],
}
_WEIGHTS = {
    "GPT-2": ["attn.c_attn.weight"],
    "Llama": ["v_proj.weight"],
    "RoBERTa": ["query.weight"],
    "ViT": ["q_proj.weight"],
}
_SCALED = {
    "GPT-2": ["c_attn", "mlp.c_proj"],
    "Llama": ["k_proj", "v_proj", "down_proj"],
    "RoBERTa": ["key", "value", "output.dense"],
    "ViT": ["k_proj", "v_proj", "fc1"],
}
_FEEDFORWARD = {
    "GPT-2": ["mlp.c_proj"],
    "Llama": ["down_proj"],
    "RoBERTa": ["output.dense"],
    "ViT": ["fc1"],
}
_NORMS = {
    "GPT-2": ["ln_1", "ln_f"],
    "Llama": ["input_layernorm", "norm"],
    "RoBERTa": ["LayerNorm"],
    "ViT": ["layernorm_before"],
}
_TABLES = {
    "GPT-2": ["wte", "wpe"],
    "Llama": ["embed_tokens"],
    "RoBERTa": ["word_embeddings"],
    "ViT": ["word_embeddings"],
}
_WORDS = {**_TABLES, "GPT-2": ["wte"]}
_HEADS = {"GPT-2": ["lm_head"], "Llama": ["lm_head"], "RoBERTa": ["classifier"], "ViT": ["classifier"]}
_TOKENS = list(range(3, VOCABULARY, 2))

_NO_WORDS = {"ViT": "no word embeddings"}
_NO_CONV2D = dict.fromkeys(("GPT-2", "Llama", "RoBERTa"), "no Conv2d")
_NO_CONV1D = {"GPT-2": "takes no Conv1D layer"}
_NO_CLASS = {**_NO_WORDS, "RoBERTa": "causal language models only"}
_RANK2: dict[str, Any] = {"r": 2, "target_modules": LAYERS}
_LORA: dict[str, Any] = {**_RANK2, "init_lora_weights": False}


def lora(**changes: Any) -> Wrap:
    return adapter("LoraConfig", **{**_LORA, **changes})


def _two_adapters(active: list[str]) -> Wrap:
    def wrap(title: str, model: nn.Module) -> nn.Module:
        model = lora()(title, model)
        model.add_adapter("second", _config(title, "LoraConfig", _LORA))
        model.base_model.set_adapter(active)
        return model

    return wrap


def everywhere(pattern: str, *, but: Mapping[str, str] | None = None) -> dict[str, str]:
    return {title: pattern for title in MODELS if title not in (but or {})}


# What parameters go through there is no torch call, so only its traces are found.
_UNSEEN = "used where the capture could not see it"
_NOT_SEEN = everywhere(_UNSEEN)
_NOT_SEEN_LINEAR = everywhere(_UNSEEN, but=_NO_CONV1D)
_PROMPT: dict[str, Any] = {"num_virtual_tokens": BATCH}  # as many as samples, so that axes can be confused
_ENCODED = {**_PROMPT, "encoder_hidden_size": 8}

ASKED = (
    Method(name="LoRA", wrap=lora()),
    Method(name="LoRA on all linear layers", wrap=lora(target_modules="all-linear")),
    Method(name="LoRA on embeddings", wrap=lora(target_modules=_TABLES), absent=_NO_WORDS),
    Method(
        name="LoRA on tied embeddings, tied itself",
        wrap=lora(target_modules=_WORDS, ensure_weight_tying=True),
        absent=_NO_WORDS,
    ),
    Method(name="LoRA on Conv2d", wrap=lora(target_modules=["projection"]), absent=_NO_CONV2D),
    Method(name="LoRA on a bare weight", wrap=lora(target_modules=[], target_parameters=_WEIGHTS)),
    Method(name="LoRA, rank-stabilised", wrap=lora(use_rslora=True)),
    Method(
        name="LoRA, rank and alpha by layer",
        wrap=lora(rank_pattern={".*1.*": 3}, alpha_pattern={".*0.*": 7}),
    ),
    Method(name="LoRA with the model's biases", wrap=lora(bias="all")),
    Method(name="LoRA with its own bias", wrap=lora(lora_bias=True)),
    Method(name="LoRA, PiSSA start", wrap=lora(init_lora_weights="pissa")),
    Method(
        name="LoRA, layers replicated",
        wrap=lora(layer_replication=[[0, 2], [1, 2]]),
        absent=dict.fromkeys(("GPT-2", "RoBERTa", "ViT"), "Llama-like models only"),
    ),
    Method(name="two LoRA adapters, one active", wrap=_two_adapters(["second"])),
    Method(
        name="two LoRA adapters, both active",
        wrap=_two_adapters(["default", "second"]),
        absent={"RoBERTa": "two saved heads cannot both be active"},
    ),
    Method(name="DoRA", wrap=lora(use_dora=True)),
    Method(name="DoRA on embeddings", wrap=lora(target_modules=_TABLES, use_dora=True), absent=_NO_WORDS),
    Method(name="DoRA on Conv2d", wrap=lora(target_modules=["projection"], use_dora=True), absent=_NO_CONV2D),
    Method(
        name="IA3",
        wrap=adapter(
            "IA3Config",
            target_modules=_SCALED,
            feedforward_modules=_FEEDFORWARD,
            init_ia3_weights=False,
        ),
    ),
    Method(name="VeRA", wrap=adapter("VeraConfig", r=4, target_modules=_EQUAL)),
    Method(
        name="AdaLoRA",
        wrap=adapter("AdaLoraConfig", total_step=9, init_r=3, target_r=2, target_modules=_EQUAL),
        # PEFT leaves the regulariser out for a model without a task type.
        refused=everywhere("the model's own loss", but={"ViT": ""}),
    ),
    Method(
        name="AdaLoRA, `orth_reg_weight=0`",
        wrap=adapter(
            "AdaLoraConfig",
            total_step=9,
            init_r=3,
            target_r=2,
            target_modules=_EQUAL,
            orth_reg_weight=0.0,
        ),
    ),
    Method(name="prompt tuning", wrap=adapter("PromptTuningConfig", **_PROMPT), absent=_NO_WORDS),
    Method(
        name="prompt tuning, several tasks",
        wrap=adapter("MultitaskPromptTuningConfig", num_tasks=2, **_PROMPT),
        absent=_NO_WORDS,
        refused=everywhere("prefix_task_cols: torch.index_select.*no rule", but=_NO_WORDS),
        columns={"task_ids": torch.arange(BATCH) % 2},
    ),
    Method(name="prefix tuning", wrap=adapter("PrefixTuningConfig", **_PROMPT), absent=_NO_WORDS),
    Method(
        name="prefix tuning, projected",
        wrap=adapter("PrefixTuningConfig", prefix_projection=True, **_ENCODED),
        absent=_NO_WORDS,
    ),
    Method(name="p-tuning, MLP", wrap=adapter("PromptEncoderConfig", **_ENCODED), absent=_NO_WORDS),
    Method(
        name="p-tuning, LSTM",
        wrap=adapter("PromptEncoderConfig", encoder_reparameterization_type="LSTM", **_ENCODED),
        absent=_NO_WORDS,
    ),
    Method(name="LoRA, head in `modules_to_save`", wrap=lora(modules_to_save=_HEADS)),
    Method(
        name="LoRA, embeddings in `modules_to_save`",
        wrap=lora(modules_to_save={**_WORDS, "ViT": ["embeddings"]}),
    ),
    Method(
        name="LoRA, tied embeddings in `modules_to_save`",
        wrap=lora(modules_to_save={**_WORDS, "ViT": ["embeddings"]}, ensure_weight_tying=True),
    ),
    Method(
        name="LoRA with `trainable_token_indices`",
        wrap=lora(trainable_token_indices=_TOKENS),
        absent=_NO_WORDS,
    ),
    Method(
        name="trainable tokens",
        wrap=adapter("TrainableTokensConfig", token_indices=_TOKENS, target_modules=_WORDS),
        absent=_NO_WORDS,
    ),
    Method(name="BitFit: `bias$`", wrap=trainable("bias$"), refused={"Llama": "matches no parameter"}),
    Method(
        name="BitFit and head: `bias$`, `classifier`",
        wrap=trainable("bias$", "classifier"),
        refused={"GPT-2": "matches no parameter", "Llama": "matches no parameter"},
    ),
    Method(name="by name: norms", wrap=trainable(r"(?i)norm|\.ln_")),
    Method(name="by name: the last block", wrap=trainable(r"\.(h|layer|layers)\.1\.")),
    Method(name="by name: embeddings", wrap=trainable("embed|wte|wpe")),
)

OTHERS = (
    Method(
        name="adaption prompt",
        wrap=adapter("AdaptionPromptConfig", adapter_len=3, adapter_layers=1),
        absent=dict.fromkeys(("RoBERTa", "ViT"), "some decoders only"),
    ),
    Method(name="BEFT", wrap=adapter("BeftConfig", target_modules=LAYERS), absent=_NO_CONV1D),
    Method(
        name="BOFT",
        wrap=adapter("BOFTConfig", boft_block_size=4, target_modules=LAYERS),
        absent=_NO_CONV1D,
        refused=everywhere("boft_R.*no rule for this operation", but=_NO_CONV1D),
    ),
    Method(
        name="C3A",
        wrap=adapter("C3AConfig", block_size=4, target_modules=LAYERS),
        absent=_NO_CONV1D,
        refused=_NOT_SEEN_LINEAR,
    ),
    Method(name="cartridge", wrap=adapter("CartridgeConfig", **_PROMPT), absent=_NO_WORDS),
    Method(
        name="CPT",
        wrap=adapter("CPTConfig", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
        absent=_NO_CLASS,
        refused=everywhere("the model's own loss", but=_NO_CLASS),
    ),
    Method(name="DeLoRA", wrap=adapter("DeloraConfig", **_RANK2), absent=_NO_CONV1D),
    Method(
        name="FourierFT",
        wrap=adapter("FourierFTConfig", n_frequency=8, target_modules=LAYERS),
        refused=everywhere("fourierft_spectrum.*: torch.Tensor.__setitem__ uses"),
    ),
    Method(name="GLoRA", wrap=adapter("GloraConfig", **_RANK2), absent=_NO_CONV1D),
    Method(name="GraLoRA", wrap=adapter("GraloraConfig", r=4, target_modules=LAYERS)),
    Method(name="HiRA", wrap=adapter("HiraConfig", **_RANK2)),
    Method(name="HRA", wrap=adapter("HRAConfig", init_weights=False, **_RANK2), absent=_NO_CONV1D),
    Method(
        name="Lily",
        wrap=adapter("LilyConfig", **_RANK2),
        absent=_NO_CONV1D,
        refused=everywhere("lily_B.*sample axis", but=_NO_CONV1D),
    ),
    Method(
        name="LoHa",
        wrap=adapter("LoHaConfig", init_weights=False, **_RANK2),
        absent=_NO_CONV1D,
        refused=_NOT_SEEN_LINEAR,
    ),
    Method(name="LoKr", wrap=adapter("LoKrConfig", init_weights=False, **_RANK2), absent=_NO_CONV1D),
    Method(name="LayerNorm tuning", wrap=adapter("LNTuningConfig", target_modules=_NORMS)),
    Method(name="MiSS", wrap=adapter("MissConfig", **_RANK2), absent=_NO_CONV1D),
    Method(
        name="OFT",
        wrap=adapter("OFTConfig", r=0, oft_block_size=4, target_modules=LAYERS),
        absent=_NO_CONV1D,
        refused=_NOT_SEEN_LINEAR,
    ),
    Method(
        name="PVeRA",
        wrap=adapter("PveraConfig", r=4, target_modules=_EQUAL),
        refused=everywhere("pvera_lambda.*the per-sample gradient is not exact"),
    ),
    Method(name="RandLoRA", wrap=adapter("RandLoraConfig", **_RANK2), refused=_NOT_SEEN),
    Method(name="RoAd", wrap=adapter("RoadConfig", group_size=4, target_modules=LAYERS), absent=_NO_CONV1D),
    Method(
        name="SHiRA",
        wrap=adapter("ShiraConfig", **_RANK2),
        absent=_NO_CONV1D,
        refused=everywhere("shira_weight.*no rule for this operation", but=_NO_CONV1D),
    ),
    Method(name="TinyLoRA", wrap=adapter("TinyLoraConfig", target_modules=LAYERS)),
    Method(name="UniLoRA", wrap=adapter("UniLoraConfig", target_modules=LAYERS)),
    Method(
        name="VB-LoRA",
        wrap=adapter("VBLoRAConfig", num_vectors=8, vector_length=8, r=2, topk=2, target_modules=_EQUAL),
    ),
    Method(
        name="WaveFT",
        wrap=adapter("WaveFTConfig", n_frequency=8, target_modules=LAYERS),
        refused=everywhere("waveft_spectrum.*: torch.Tensor.__getitem__ uses"),
    ),
)
