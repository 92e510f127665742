"""Loads a tokenizer or image processor and a model, and says which parameters train.

Guarantee: after :func:`choose_trainable` exactly the parameters that a pattern
finds require gradients, and every pattern has found at least one. A pattern that
matches nothing is an error: the run would train less than its YAML says.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.arguments import ModelArguments
from dp_trainer.tasks.base import Processor, Task, Tokenizer
from dp_trainer.tasks.names import nearest, quoted
from dp_trainer.tasks.places import PACKAGE_PREFIX, Place, resolve_model

# What peft calls the kinds of models whose new head it trains beside the adapters, or whose inputs it knows.
ADAPTED_AS = {"AutoModelForSequenceClassification": "SEQ_CLS", "AutoModelForCausalLM": "CAUSAL_LM"}


def load_tokenizer(arguments: ModelArguments) -> Tokenizer:
    """Loads the model's tokenizer; one without a padding token pads with its end token.

    Padding is masked and carries no label, so the choice changes no loss.
    """
    place = resolve_model(arguments.model_name_or_path)
    with _reading(arguments.model_name_or_path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            place.name, revision=arguments.model_revision, **place.settings
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigurationError(
                f"{arguments.model_name_or_path}: the tokenizer has neither a padding nor an end token. "
                "Add a pad_token to its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(task: Task, arguments: ModelArguments) -> Processor:
    """Loads what makes the task's model inputs: the model's tokenizer, or its image processor.

    Raises:
        ConfigurationError: If it cannot be read, or needs a package that is missing.
    """
    if task.auto_processor == "AutoTokenizer":
        return load_tokenizer(arguments)
    auto_processor = getattr(transformers, task.auto_processor)
    try:
        with _reading(arguments.model_name_or_path):
            return auto_processor.from_pretrained(
                resolve_model(arguments.model_name_or_path).name, revision=arguments.model_revision
            )
    except ImportError as error:
        # Some processors have no form without torchvision.
        reason = next(line.strip() for line in str(error).splitlines() if line.strip())
        raise ConfigurationError(
            f"{arguments.model_name_or_path}: its image processor needs a package that is missing ({reason}). "
            "Install it, usually: pip install torchvision pillow"
        ) from error


def load_model(task: Task, arguments: ModelArguments, processor: Processor) -> nn.Module:
    """Loads the model with the task's head and freezes what should not train.

    Guarantee: of a vision checkpoint with another number of classes the head alone starts anew;
    one whose body has other shapes is refused.

    A new head starts from torch's global generator: seed it first for repeatable runs.
    """
    place = resolve_model(arguments.model_name_or_path)
    settings: dict[str, Any] = {
        "revision": arguments.model_revision,
        "dtype": getattr(torch, arguments.dtype),
    }
    if task.labels is not None:
        names = dict(enumerate(task.labels))
        settings |= {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {v: k for k, v in names.items()},
        }
    model = _load_weights(task, arguments.model_name_or_path, place, settings)
    config: Any = model.config
    if task.auto_processor == "AutoTokenizer" and config.pad_token_id is None:
        # Decoder models with a classification head look for the last token that is not padding.
        config.pad_token_id = processor.pad_token_id
    if task.adapt_model is not None:
        task.adapt_model(model, processor)
    if arguments.lora_rank is not None:
        return add_lora(model, task, arguments)
    if arguments.trainable is not None:
        choose_trainable(model, arguments.trainable)
    return model


def _without_quantization(model: nn.Module) -> nn.Module:
    """Returns the same weights in a model that knows of no quantization, so that it can be trained and saved.

    transformers has turned the file's numbers into ordinary weights already, and
    still takes the model for a quantized one.
    """
    config: Any = copy.deepcopy(model.config)
    del config.quantization_config
    plain: nn.Module = type(model)(config).to(next(model.parameters()).dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _load_weights(task: Task, name: str, place: Place, settings: dict[str, Any]) -> nn.Module:
    auto_model = getattr(transformers, task.auto_model)
    model: nn.Module
    with _reading(name):
        if task.auto_processor == "AutoTokenizer":
            model = auto_model.from_pretrained(place.name, **settings, **place.settings)
            return model if place.gguf_file is None else _without_quantization(model)
        # Pretrained vision models come with a head for the classes of their own data.
        model, loaded = auto_model.from_pretrained(
            place.name, ignore_mismatched_sizes=True, output_loading_info=True, **settings
        )
    body = f"{model.base_model_prefix}."
    reshaped = [key for key, *_ in loaded["mismatched_keys"] if key.startswith(body)]
    if reshaped:
        raise ConfigurationError(
            f"model_name_or_path={name}: {quoted(reshaped[:3])} of the checkpoint have other shapes than the model, "
            "beside its head. Correct its config.json, or load another checkpoint."
        )
    return model


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns the libraries' errors about a missing or unreadable model into ours."""
    try:
        yield
    except (OSError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigurationError(
            f"model_name_or_path={name}: cannot be loaded ({first}). Give a hub name that can be "
            f"reached or is cached, a folder with config.json and weights, or {PACKAGE_PREFIX}<module>/<folder>."
        ) from error


def choose_trainable(model: nn.Module, patterns: list[str]) -> None:
    """Lets exactly the parameters train whose name one of the patterns finds.

    Args:
        model: Changed in place: ``requires_grad`` of every parameter is set.
        patterns: Regular expressions, searched anywhere in a parameter's name.

    Raises:
        ConfigurationError: For a malformed pattern, or one that finds no parameter.
    """
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in parameters if re.search(pattern, name)}
        except re.error as error:
            raise ConfigurationError(
                f"trainable: '{pattern}' is not a regular expression ({error}). Escape special characters."
            ) from error
        if not found:
            # A pattern is mostly one part of a name ("LayerNorm"), so compare it with parts too.
            parts = {part for name in parameters for part in name.split(".")} | set(parameters)
            raise ConfigurationError(
                f"trainable: '{pattern}' matches no parameter of {type(model).__name__}; "
                f"the nearest names are {quoted(nearest(pattern, parts, count=3))}. Correct or remove it."
            )
        chosen |= found
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)


def add_lora(model: nn.Module, task: Task, arguments: ModelArguments) -> nn.Module:
    """Wraps the model so that low-rank adapters, and a new classification head, train.

    Raises:
        ConfigurationError: If peft is missing or knows no default modules for this model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigurationError(
            "lora_rank: needs the package peft. Install it (pip install 'dp_trainer[peft]') or leave lora_rank out."
        )
    import peft

    try:
        wrapped: nn.Module = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=arguments.lora_rank,
                lora_alpha=arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha,
                target_modules=arguments.lora_target_modules,
                # GPT-2's layers keep their weights the other way round; peft corrects a wrong value with a warning.
                fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
                task_type=ADAPTED_AS.get(task.auto_model),
                modules_to_save=_heads(model)
                if task.auto_model == "AutoModelForImageClassification"
                else None,
            ),
        )
    except ValueError as error:
        leaves = sorted(
            {name.rpartition(".")[2] for name, part in model.named_modules() if not list(part.children())}
        )
        raise ConfigurationError(
            f"lora_target_modules: {str(error).splitlines()[0]} "
            f"Set lora_target_modules to some of {quoted(leaf for leaf in leaves if leaf)}."
        ) from error
    return wrapped


def _heads(model: nn.Module) -> list[str]:
    """The new head's modules: what stands beside the pretrained body and has parameters."""
    body = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, child in model.named_children()
        if name != body and any(True for _ in child.parameters())
    ]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns how many parameters train, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
