"""Models of the true size with random weights, and one micro-batch for each.

Random weights cost what trained ones cost. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Batch = dict[str, Tensor]
Changed = tuple[nn.Module, Batch]

GPT2_VOCABULARY = 50257


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a micro-batch.

    Args:
        model: Builds the model; parameters that do not train have ``requires_grad=False``.
        batch: Builds a micro-batch with a column ``labels``.
        title: Model and micro-batch in words.
        for_opacus: Changes a model and a micro-batch so that Opacus takes them; None if
            Opacus is not compared on this case.
        opacus_note: What ``for_opacus`` changes.
        needs: An optional package without which the case is left out.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    title: str
    for_opacus: Callable[[nn.Module, Batch], Changed] | None = None
    opacus_note: str = ""
    needs: str = ""

    @property
    def is_available(self) -> bool:
        """Whether the package that the case needs is installed."""
        return not self.needs or find_spec(self.needs) is not None


def gpt2(*, layers: int = 12) -> nn.Module:
    """GPT-2's smallest size, or fewer of its layers."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers))


def gpt2_lora() -> nn.Module:
    """GPT-2 with LoRA of rank 8 on the attention's input projections; nothing else trains."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return get_peft_model(gpt2(), settings)


def roberta() -> nn.Module:
    """RoBERTa base with a classification head."""
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2
    )
    return transformers.RobertaForSequenceClassification(config)


def vit() -> nn.Module:
    """ViT small."""
    config = transformers.ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=10
    )
    return transformers.ViTForImageClassification(config)


def llama(*, layers: int = 30, vocabulary: int = 49152) -> nn.Module:
    """A Llama of SmolLM2-135M's shape, grouped key and value heads, tied head; or with other layers and tokens."""
    config = transformers.LlamaConfig(
        hidden_size=576, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tokens(samples: int, length: int, vocabulary: int) -> Batch:
    """Random tokens without padding, each the label of the one before."""
    input_ids_BT = torch.randint(0, vocabulary, (samples, length))
    return {"input_ids": input_ids_BT, "labels": input_ids_BT}


def roberta_batch() -> Batch:
    """8 sentences of 128 tokens."""
    return {
        "input_ids": torch.randint(3, 50265, (8, 128)),
        "attention_mask": torch.ones(8, 128, dtype=torch.long),
        "labels": torch.randint(0, 2, (8,)),
    }


def vit_batch() -> Batch:
    """8 images of 224 × 224 pixels."""
    return {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.randint(0, 10, (8,))}


def gpt2_for_opacus(model: nn.Module, batch: Batch) -> Changed:
    """Replaces Conv1D by Linear, unties the head, and repeats the position ids for each sample."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.detach().T.contiguous()), module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    samples, length = batch["input_ids"].shape
    positions_BT = torch.arange(length, device=batch["input_ids"].device).expand(samples, -1).contiguous()
    return model, {**batch, "position_ids": positions_BT}


def unchanged(model: nn.Module, batch: Batch) -> Changed:
    """For models that Opacus takes as they are."""
    return model, dict(batch)


CASES = {
    "gpt2": Case(
        model=gpt2,
        batch=lambda: tokens(4, 100, GPT2_VOCABULARY),
        title="GPT-2, 124M parameters, 4 samples of 100 tokens",
        for_opacus=gpt2_for_opacus,
        opacus_note="Conv1D replaced by Linear, head untied (39M more parameters), position ids repeated",
    ),
    "gpt2-lora": Case(
        model=gpt2_lora,
        batch=lambda: tokens(4, 100, GPT2_VOCABULARY),
        title="GPT-2 with LoRA (rank 8, 0.3M parameters train), 4 samples of 100 tokens",
        needs="peft",
    ),
    "gpt2-long": Case(
        model=lambda: gpt2(layers=4),
        batch=lambda: tokens(2, 512, GPT2_VOCABULARY),
        title="GPT-2 with 4 layers, 68M parameters, 2 samples of 512 tokens",
    ),
    "gpt2-1024-b1": Case(
        model=lambda: gpt2(layers=4),
        batch=lambda: tokens(1, 1024, GPT2_VOCABULARY),
        title="GPT-2 with 4 layers, 68M parameters, 1 sample of 1024 tokens",
    ),
    "gpt2-1024-b4": Case(
        model=lambda: gpt2(layers=4),
        batch=lambda: tokens(4, 1024, GPT2_VOCABULARY),
        title="GPT-2 with 4 layers, 68M parameters, 4 samples of 1024 tokens",
    ),
    "roberta-base": Case(
        model=roberta,
        batch=roberta_batch,
        title="RoBERTa-base, 125M parameters, 8 samples of 128 tokens",
        for_opacus=unchanged,
    ),
    "vit-small": Case(
        model=vit,
        batch=vit_batch,
        title="ViT-small, 22M parameters, 8 images of 224 × 224 pixels",
        for_opacus=unchanged,
    ),
    "llama": Case(
        model=llama,
        batch=lambda: tokens(4, 100, 49152),
        title="Llama of SmolLM2-135M's shape, 135M parameters, 4 samples of 100 tokens",
    ),
    "wide-head": Case(
        model=lambda: llama(layers=4, vocabulary=256_000),
        batch=lambda: tokens(4, 256, 256_000),
        title="Llama-like with 4 layers and 256,000 tokens in its vocabulary, 162M parameters, 4 samples of 256 tokens",
    ),
}
# Those left out take most memory; the first adds little to gpt2-1024-b1, the second is there for its memory.
DEFAULT_CASES = tuple(name for name in CASES if name not in ("gpt2-1024-b4", "wide-head"))


def small_gpt2(*, width: int, layers: int, samples: int, length: int) -> Case:
    """A GPT-2-like model of any size, 256 tokens in its vocabulary, no dropout, for sweeps over one axis."""
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=length, n_embd=width, n_layer=layers, n_head=max(1, width // 64),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Case(
        model=lambda: transformers.GPT2LMHeadModel(config),
        batch=lambda: tokens(samples, length, 256),
        title=f"GPT-2-like, width {width}, {layers} layers, {samples} samples of {length} tokens",
    )


def small_llama(*, width: int, layers: int, samples: int, length: int) -> Case:
    """A Llama-like model of any size, 256 tokens in its vocabulary."""
    heads = max(2, width // 64)
    config = transformers.LlamaConfig(
        vocab_size=256, max_position_embeddings=length, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, intermediate_size=3 * width,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Case(
        model=lambda: transformers.LlamaForCausalLM(config),
        batch=lambda: tokens(samples, length, 256),
        title=f"Llama-like, width {width}, {layers} layers, {samples} samples of {length} tokens",
    )
