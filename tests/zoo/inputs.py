"""What single model types are fed or trained on beside what their head's other models are.

Axes: B sample, T position, N box.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_trainer.terms import IGNORED_LABEL

from .configs import PAD
from .heads import HEADS, LENGTHS, Batch, MakeBatch, PerSampleLoss

Adapt = Callable[[Batch, Any, torch.Generator], Batch]
LONGER = (40, 17, 33, 20)


def _with_boxes(batch: Batch, _config: Any, generator: torch.Generator) -> Batch:
    corners = torch.randint(0, 30, (*batch["input_ids"].shape, 4), generator=generator)
    # The third and fourth are the far corner, which must not come before the near one.
    corners[..., 2:] += 30
    return {**batch, "bbox": corners}


def _with_normalized_boxes(batch: Batch, config: Any, generator: torch.Generator) -> Batch:
    boxes = _with_boxes(batch, config, generator)["bbox"]
    return {**batch, "bbox": boxes / 64}


def _with_global_attention(batch: Batch, _config: Any, _generator: torch.Generator) -> Batch:
    mask = torch.zeros_like(batch["input_ids"])
    mask[..., 0] = 1
    return {**batch, "global_attention_mask": mask}


def _with_regions(batch: Batch, config: Any, generator: torch.Generator) -> Batch:
    size, boxes = len(LENGTHS), 3
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "visual_feats": torch.randn(size, boxes, config.visual_feat_dim, generator=generator),
        "visual_pos": torch.rand(size, boxes, 4, generator=generator),
        "labels": torch.zeros(size, dtype=torch.long),
    }


def _with_glyphs(batch: Batch, _config: Any, _generator: torch.Generator) -> Batch:
    ids = batch["input_ids"]
    return {**batch, "input_shape_ids": ids.flip(-1), "input_pronunciation_ids": ids.flip(-1)}


def _pixels_as_tokens(batch: Batch, _config: Any, generator: torch.Generator) -> Batch:
    return {
        "input_ids": torch.randint(0, 32, (len(LENGTHS), 9), generator=generator),
        "labels": batch["labels"],
    }


def _with_decoder_inputs(batch: Batch, config: Any, _generator: torch.Generator) -> Batch:
    """As a collator adds that knows the model: of this one the own loss would feed the inputs to the decoder."""
    labels = batch["labels"]
    return {
        **batch,
        "decoder_input_ids": F.pad(labels[:, :-1], (1, 0), value=config.eos_token_id).clamp(min=PAD),
    }


def _a_row_a_codebook(batch: Batch, config: Any, generator: torch.Generator) -> Batch:
    """Audio codes, (B, codebooks, T)."""
    size, length = batch["input_ids"].shape
    shape = (size, getattr(config, "decoder", config).num_codebooks, length)
    return {
        "input_ids": torch.randint(3, 32, shape, generator=generator),
        "attention_mask": batch["attention_mask"],
    }


def _named(**names: str) -> Adapt:
    def rename(batch: Batch, _config: Any, _generator: torch.Generator) -> Batch:
        return {names.get(name, name): value for name, value in batch.items()}

    return rename


def _patches(batch: Batch, config: Any, generator: torch.Generator) -> Batch:
    vision = getattr(config, "vision_config", config)
    size, side = len(LENGTHS), 3
    width = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.randn(size, side * side, width, generator=generator),
        "pixel_attention_mask": torch.ones(size, side * side, dtype=torch.long),
        "spatial_shapes": torch.full((size, 2), side),
        "labels": batch["labels"],
    }


def _spectra(
    bins: Callable[[Any], int], frames: int = 48, *, masked: bool = True, name: str = "input_features"
) -> Adapt:
    """Frames of spectra, (B, frames, bins), of unequal lengths where the model takes a mask."""

    def adapt(batch: Batch, config: Any, generator: torch.Generator) -> Batch:
        size = len(batch["labels"])
        features = torch.randn(size, frames, bins(config), generator=generator)
        mask = (torch.arange(frames) < frames - 4 * torch.arange(size)[:, None]).long()
        return {name: features, **({"attention_mask": mask} if masked else {}), "labels": batch["labels"]}

    return adapt


def _whole_spectrum(batch: Batch, config: Any, generator: torch.Generator) -> Batch:
    """(B, bins, frames), always of the same number of frames."""
    shape = (len(batch["labels"]), config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": torch.randn(shape, generator=generator), "labels": batch["labels"]}


def _long_sound(batch: Batch, _config: Any, generator: torch.Generator) -> Batch:
    """Raw audio for feature extractors that step 64 or 80 samples at a time."""
    mask = (torch.arange(2400) < torch.tensor([2400, 1600, 2000, 1760])[:, None]).long()
    sound = torch.randn(mask.shape, generator=generator) * mask
    return {"input_values": sound, "attention_mask": mask, "labels": batch["labels"]}


def _codes(batch: Batch, config: Any, generator: torch.Generator) -> Batch:
    """Text and audio codes side by side, (B, T, 1 + codebooks)."""
    shape = (*batch["input_ids"].shape, config.num_codebooks)
    codes = torch.randint(0, 32, shape, generator=generator)
    return {**batch, "input_ids": torch.cat([batch["input_ids"][..., None], codes], -1)}


def _text_to_codes(batch: Batch, config: Any, generator: torch.Generator) -> Batch:
    ids = torch.randint(3, 64, (len(LENGTHS), max(LENGTHS)), generator=generator)
    shape = (*ids.shape, config.decoder_config.num_channels)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": torch.randint(3, 64, shape, generator=generator),
    }


def _with_stream(batch: Batch, config: Any, generator: torch.Generator) -> Batch:
    """Beside each token its share of the sound: as many frames as become one token."""
    size, tokens = batch["input_ids"].shape
    shape = (size, config.audio_config.num_mel_bins, tokens * config.audio_length_per_tok)
    return {**batch, "input_features": torch.randn(shape, generator=generator)}


def _to_full_length(batch: Batch, config: Any, _generator: torch.Generator) -> Batch:
    """Padded to all positions, of which this model predicts every one."""
    room = config.max_position_embeddings - batch["input_ids"].shape[1]
    padding = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORED_LABEL}
    full = {n: F.pad(v, (0, room), value=padding[n]) for n, v in batch.items()}
    return {"inputs": full.pop("input_ids"), **full}


def _with_picture(batch: Batch, config: Any, generator: torch.Generator) -> Batch:
    size, pictured = len(LENGTHS), config.mm_tokens_per_image
    ids = torch.randint(3, 64, (size, pictured + 5), generator=generator)
    ids[:, 1 : 1 + pictured] = config.image_token_index
    return {
        **batch,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == config.image_token_index).long(),
    }


# By model type: rows for all heads, and rows for one head, (type, head), which come first.
ADAPTERS: dict[str | tuple[str, str], Adapt] = {
    "audio-spectrogram-transformer": _spectra(
        lambda c: c.num_mel_bins, frames=32, masked=False, name="input_values"
    ),
    "canary": _spectra(lambda c: c.encoder_config.num_mel_bins),
    "cohere_asr": _spectra(lambda c: c.encoder_config.num_mel_bins),
    "dia": _text_to_codes,
    "granite_speech5_ctc": _spectra(lambda c: 4 * c.encoder_config.num_mel_bins),
    "fsmt": _with_decoder_inputs,
    "kyutai_speech_to_text": _codes,
    "lasr_ctc": _spectra(lambda c: c.encoder_config.num_mel_bins),
    "parakeet_ctc": _spectra(lambda c: c.encoder_config.num_mel_bins),
    ("seamless_m4t", "speech seq2seq"): _spectra(lambda c: c.feature_projection_input_dim),
    ("seamless_m4t_v2", "speech seq2seq"): _spectra(lambda c: c.feature_projection_input_dim),
    "shieldgemma2": _with_picture,
    "speech_to_text": _spectra(lambda c: c.input_feat_per_channel),
    "videoprism_vision_model": _named(pixel_values="pixel_values_videos"),
    "vjepa2": _named(pixel_values="pixel_values_videos"),
    "voxtral_realtime": _with_stream,
    "wav2vec2-bert": _spectra(lambda c: c.feature_projection_input_dim),
    ("whisper", "audio classification"): _whole_spectrum,
    ("whisper", "speech seq2seq"): _whole_spectrum,
    ("pop2piano", "speech seq2seq"): _spectra(lambda c: c.d_model, frames=12),
    "bros": _with_normalized_boxes,
    "imagegpt": _pixels_as_tokens,
    "layoutlm": _with_boxes,
    "layoutlmv3": _with_boxes,
    "lilt": _with_boxes,
    "longformer": _with_global_attention,
    "lxmert": _with_regions,
    "musicgen": _a_row_a_codebook,
    "musicgen_melody": _a_row_a_codebook,
    "moonshine": _long_sound,
    "moonshine_streaming": _long_sound,
    ("perceiver", "masked LM"): _to_full_length,
    ("perceiver", "sequence classification"): _named(input_ids="inputs"),
    ("perceiver", "image classification"): _named(pixel_values="inputs"),
    "roc_bert": _with_glyphs,
    "siglip2": _patches,
}
# Types that pool, or cut their input into blocks, and so need longer samples.
LENGTHENED = {"canine", "funnel"}


def batch_for(model_type: str, head: str, config: Any, generator: torch.Generator) -> Batch:
    """The micro-batch for a head of a model type."""
    make: MakeBatch = HEADS[head].batch
    lengths = LONGER if model_type in LENGTHENED else LENGTHS
    batch = make(config, generator, lengths)
    adapt = ADAPTERS.get((model_type, head)) or ADAPTERS.get(model_type)
    return adapt(batch, config, generator) if adapt else batch


def _projection(model: nn.Module, micro_batch: Mapping[str, Any], *, name: str = "logits") -> Tensor:
    """A fixed projection of one output of each sample, for heads whose own loss has no per-sample form here."""
    inputs = {key: value for key, value in micro_batch.items() if key != "labels"}
    outputs_BK = getattr(model(**inputs), name).flatten(1)
    return outputs_BK @ torch.cos(torch.arange(outputs_BK.shape[1], dtype=outputs_BK.dtype))


def _codes_loss(model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor:
    """A fixed projection of logits whose rows are a sample's channels, one after the other."""
    size = len(micro_batch["input_ids"])
    logits_BK = model(**micro_batch).logits.reshape(size, -1)
    return logits_BK @ torch.cos(torch.arange(logits_BK.shape[1], dtype=logits_BK.dtype))


LOSSES: dict[tuple[str, str], PerSampleLoss] = {
    ("dia", "speech seq2seq"): _codes_loss,
    # Its own loss counts the tokens of a picture, which is not among the inputs here.
    ("git", "causal LM"): _projection,
    ("musicgen", "causal LM"): _codes_loss,
    ("musicgen_melody", "causal LM"): _codes_loss,
    ("shieldgemma2", "image classification"): _projection,
    ("lxmert", "question answering"): functools.partial(_projection, name="question_answering_score"),
    ("videoprism_vision_model", "video classification"): _projection,
    ("pp_lcnet", "image classification"): functools.partial(_projection, name="last_hidden_state"),
}
