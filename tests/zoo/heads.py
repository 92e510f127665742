"""What each kind of head is fed and trained on, at toy size.

Axes: B sample, T position, C choice or class, F audio frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dp_trainer.losses import per_sample_loss_for
from dp_trainer.terms import IGNORED_LABEL

from .configs import END, FIRST_SPECIAL_TOKEN

LENGTHS = (9, 4, 7, 3)
CLASSES = 3
CHOICES = 2

Batch = dict[str, Any]
MakeBatch = Callable[[Any, torch.Generator, tuple[int, ...]], Batch]
PerSampleLoss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def _ids(lengths: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, FIRST_SPECIAL_TOKEN, mask.shape, generator=generator) * mask
    return ids, mask


def _classes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, CLASSES, shape, generator=generator)


def text(_config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    ids, mask = _ids(lengths, generator)
    return {"input_ids": ids, "attention_mask": mask}


def language(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    batch = text(config, generator, lengths)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)}


def masked_language(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    batch = language(config, generator, lengths)
    hidden = torch.rand(batch["labels"].shape, generator=generator) < 0.5
    hidden[:, 0] = False
    return {**batch, "labels": batch["labels"].masked_fill(hidden, IGNORED_LABEL)}


def targets(generator: torch.Generator, lengths: tuple[int, ...]) -> Tensor:
    """Labels whose lengths run against those of the inputs."""
    ids, mask = _ids(lengths[::-1], generator)
    return ids.masked_fill(mask == 0, IGNORED_LABEL)


def sequence_to_sequence(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    """For a language model that also hears, which transformers lists here too, text alone."""
    if not config.is_encoder_decoder:
        return language(config, generator, lengths)
    return {**text(config, generator, lengths), "labels": targets(generator, lengths)}


def sequence_class(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    batch = text(config, generator, lengths)
    # Encoder-decoder models read the class off the end token, which each sample must have once.
    batch["input_ids"][torch.arange(len(lengths)), torch.tensor(lengths) - 1] = END
    return {**batch, "labels": _classes(generator, len(lengths))}


def token_class(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    batch = text(config, generator, lengths)
    labels = _classes(generator, *batch["input_ids"].shape)
    return {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)}


def span(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    starts = torch.tensor([3, 0, 5, 1])
    return {**text(config, generator, lengths), "start_positions": starts, "end_positions": starts + 1}


def choices(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    batches = [text(config, generator, lengths) for _ in range(CHOICES)]
    stacked = {name: torch.stack([batch[name] for batch in batches], 1) for name in batches[0]}
    return {**stacked, "labels": torch.randint(0, CHOICES, (len(lengths),), generator=generator)}


def _image_size(config: Any) -> int:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    return size if isinstance(size, int) else size[0]


def images(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    size = _image_size(config)
    pixels = torch.randn(len(lengths), 3, size, size, generator=generator)
    return {"pixel_values": pixels, "labels": _classes(generator, len(lengths))}


def videos(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    size, frames = _image_size(config), getattr(config, "num_frames", 4)
    pixels = torch.randn(len(lengths), frames, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "labels": _classes(generator, len(lengths))}


def _sounding(_config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    """Raw audio, with a mask, since lengths differ."""
    samples = torch.tensor(lengths) * 18
    mask = (torch.arange(int(samples.max())) < samples[:, None]).long()
    return {"input_values": torch.randn(mask.shape, generator=generator) * mask, "attention_mask": mask}


def sound_class(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    return {**_sounding(config, generator, lengths), "labels": _classes(generator, len(lengths))}


def sound_tokens(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    # Of two tokens at most, since few frames are left of the sound.
    labels = torch.randint(3, 9, (len(lengths), 2), generator=generator)
    labels[1::2, 1] = IGNORED_LABEL
    return {**_sounding(config, generator, lengths), "labels": labels}


def sound_to_text(config: Any, generator: torch.Generator, lengths: tuple[int, ...]) -> Batch:
    """For an encoder and a decoder raw audio; for a decoder alone text, as in a sample without sound."""
    if not config.is_encoder_decoder:
        return language(config, generator, lengths)
    return {**_sounding(config, generator, lengths), "labels": targets(generator, lengths)}


def head_loss(model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
    """The loss that the trainer itself would use."""
    return per_sample_loss_for(model)(model, micro_batch)


@dataclass(frozen=True)
class ZooHead:
    """One of transformers' auto mappings, and what its models are fed."""

    name: str
    table: str
    batch: MakeBatch


HEADS = {
    head.name: head
    for head in (
        ZooHead("causal LM", "CAUSAL_LM", language),
        ZooHead("masked LM", "MASKED_LM", masked_language),
        ZooHead("seq2seq LM", "SEQ_TO_SEQ_CAUSAL_LM", sequence_to_sequence),
        ZooHead("sequence classification", "SEQUENCE_CLASSIFICATION", sequence_class),
        ZooHead("token classification", "TOKEN_CLASSIFICATION", token_class),
        ZooHead("question answering", "QUESTION_ANSWERING", span),
        ZooHead("multiple choice", "MULTIPLE_CHOICE", choices),
        ZooHead("image classification", "IMAGE_CLASSIFICATION", images),
        ZooHead("video classification", "VIDEO_CLASSIFICATION", videos),
        ZooHead("audio classification", "AUDIO_CLASSIFICATION", sound_class),
        ZooHead("speech seq2seq", "SPEECH_SEQ_2_SEQ", sound_to_text),
        ZooHead("CTC", "CTC", sound_tokens),
    )
}
