"""Lets a masked language model answer with one of K words at its mask.

Guarantee: the answer to a sample is exactly the model's own logits of those
words at the mask, and the loss is the cross-entropy over these K alone. The
head runs at the mask only, not at all positions: it costs (B, 1, V) logits
instead of (B, T, V), and every sample's gradient of the vocabulary matrix, tied
or not, has one position. The model's class, parameters and files stay its own.

Axes: B sample, T position, D width, V vocabulary, K class.

Source: Li et al. 2021 (arXiv 2110.05679), where K logits are compared as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.base import LossFunction


def answer_at_mask(model: nn.Module, *, mask_token_id: int, word_ids: Sequence[int]) -> ExitStack:
    """Changes what the model returns: logits (B, K) of the words at each sample's mask.

    Args:
        model: One of the auto class for masked language models.
        mask_token_id: Its tokenizer's mask. Each row of ``input_ids`` must hold it once.
        word_ids: The tokens that stand for the classes, in the order of their ids.

    Returns:
        Closing it, or leaving its ``with`` block, gives the model its own answers back; for
        a model that answers so for all its life it can be dropped.

    Raises:
        ConfigurationError: If the model has no body apart from its head; in a forward pass, if a
            sample has no mask or several, or labels are handed to the model, whose own loss reads
            them as tokens.
    """
    body = getattr(model, "base_model", model)
    if body is model:
        raise ConfigurationError(
            f"{type(model).__name__}: has no body that a head reads, so the mask cannot be picked before it. "
            "Use another masked language model, or set head: classification."
        )

    def pick_mask(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        input_ids_BT = kwargs.get("input_ids", args[0] if args else None)
        if input_ids_BT is None:
            raise ConfigurationError(
                "label words: the model was called without input_ids, which tell where the mask is. Pass them."
            )
        states_BTD = output[0]
        places_B = _mask_places(input_ids_BT, mask_token_id)
        if states_BTD.shape[:2] != input_ids_BT.shape:
            raise ConfigurationError(
                f"{type(module).__name__}: makes {tuple(states_BTD.shape)} of tokens "
                f"{tuple(input_ids_BT.shape)}, so their places are not told. Set head: classification."
            )
        # Not states[range, places]: a gather keeps it plain to the capture that row b is sample b's.
        index_B1D = places_B[:, None, None].expand(-1, 1, states_BTD.shape[2])
        return _with_first(output, states_BTD.gather(1, index_B1D))

    def pick_words(module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("labels") is not None:
            raise ConfigurationError(
                f"{type(module).__name__}: answers with label words, and its own loss reads labels as tokens. Pass "
                "compute_loss_func=class_losses(0.0), which takes the labels instead."
            )
        logits_B1V = output[0]
        words_K = torch.tensor(word_ids, device=logits_B1V.device)
        return _with_first(output, logits_B1V[:, 0].index_select(1, words_K))

    hooks = ExitStack()
    hooks.enter_context(body.register_forward_hook(pick_mask, with_kwargs=True))
    hooks.enter_context(model.register_forward_hook(pick_words, with_kwargs=True))
    return hooks


def _mask_places(input_ids_BT: Tensor, mask_token_id: int) -> Tensor:
    is_mask_BT = input_ids_BT == mask_token_id
    counts_B = is_mask_BT.sum(1)
    if not bool((counts_B == 1).all()):
        raise ConfigurationError(
            f"label words: each sample needs one mask (token {mask_token_id}); the samples have {counts_B.tolist()}. "
            "Prepare them with the task's template."
        )
    return is_mask_BT.int().argmax(1)


def _with_first(output: Any, first: Tensor) -> Any:
    """The output with another first entry; its other entries stay."""
    if isinstance(output, tuple):
        return (first, *output[1:])
    name = next(iter(output))
    return type(output)(**{**output, name: first})


def class_losses(label_smoothing: float) -> LossFunction:
    """Returns a ``compute_loss_func`` for logits (B, K) and class ids (B,): cross-entropy.

    It serves ``DPTrainer``, which wants one loss a sample, and ``Trainer``, which
    hands in the number of targets to average over.

    Args:
        label_smoothing: The share of each target spread evenly over all classes.
    """

    def losses(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits_BK: Tensor = outputs["logits"]
        if logits_BK.dim() != 2 or labels.shape != logits_BK.shape[:1]:
            raise ConfigurationError(
                f"label words: logits {tuple(logits_BK.shape)} and labels {tuple(labels.shape)} are not (B, K) and "
                "(B,). Call answer_at_mask(model, …), and give one class id a sample."
            )
        losses_B = F.cross_entropy(
            logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32)),
            labels,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return losses_B if num_items_in_batch is None else losses_B.sum() / num_items_in_batch

    return losses
