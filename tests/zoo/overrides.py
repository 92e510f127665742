"""What the shrinking by field names cannot know: a row a model type, each for a stated need of that model."""

from __future__ import annotations

from typing import Any

from .configs import VOCABULARY

_SWIN = {"image_size": 32, "depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "encoder_stride": 8}
_GRANITE_SPEECH = {
    "encoder_config": {"context_size": 8, "max_pos_emb": 16, "input_dim": 16},
    "window_size": 3,
}
# Attention and recurrent layers in turn, so that the cache has one of each.
_TWO_KINDS = {"attn_layer_period": 2, "attn_layer_offset": 1}
_WINDOWED = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
# Each step doubles the width.
_FEWER_STEPS = {"downsampling_ratios": [2, 4], "depths": [1, 1, 1]}
_MUSIC_DECODER = {"decoder": {"num_codebooks": 2}}

FIELDS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 32, "frequency_stride": 4, "time_stride": 4},
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"num_groups": 2},
    "blt": {"encoder_hash_byte_group_vocab": 64, "use_cache": False},
    # Its boxes' sines and cosines share a fraction of the width.
    "bros": {"hidden_size": 64},
    "clip": {"vision_config": {"patch_size": 4}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    # It reads the rate of a stage's layers at the stage's number.
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": _SWIN,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _WINDOWED,
        "vision_config": {"adapter_in_dim": 32},
        "audio_config": {"adapter_input_size": 32},
    },
    "dots3_note_text": _WINDOWED,
    "efficientnet": {
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "image_size": 32,
        "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 16],
        "kernel_sizes": [3, 3, 5],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 1, 1],
        "expand_ratios": [1, 2, 2],
        "hidden_dim": 1280,
    },
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": 4},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech": _GRANITE_SPEECH,
    "granite_speech_plus": _GRANITE_SPEECH,
    "granite_speech5_ctc": {"encoder_config": {"context_size": 8}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hgnet_v2": {"stem_channels": [3, 8, 16], "stage_in_channels": [16] * 4},
    "jamba": _TWO_KINDS,
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 32}},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "levit": {"key_dim": [8, 8, 8], "num_attention_heads": [2, 2, 2], "image_size": 64, "patch_size": 16},
    # Its six coordinates share the width evenly.
    "lilt": {"hidden_size": 48},
    "lxmert": {"visual_feat_dim": 16, "l_layers": 2, "x_layers": 1, "r_layers": 1},
    "mamba2": {"head_dim": 16},
    "metaclip_2": {"vision_config": {"patch_size": 4}},
    "mobilevit": {"image_size": 64},
    "mobilevitv2": {"image_size": 64},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    # Its number of buckets is written into the code.
    "mpnet": {"relative_attention_num_buckets": 32},
    "musicgen": _MUSIC_DECODER,
    "musicgen_melody": _MUSIC_DECODER,
    "nemo_speechlm": {
        "text_config": {"num_key_value_heads": 4},
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
    },
    "neomme": {"head_dim": 16},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 16,
        "d_model": 16,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "train_size": [16, 16],
    },
    "pvt": {"image_size": 64},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 4},
    "reformer": {
        "axial_pos_shape": [3, 3],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 5, "no_token_index": 6},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "textnet": {"stem_out_channels": 16, "image_size": [32, 32]},
    "vibevoice": {"audio_config": _FEWER_STEPS, "semantic_model_config": _FEWER_STEPS},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _FEWER_STEPS,
        "semantic_tokenizer_encoder_config": _FEWER_STEPS,
    },
    "videoprism_vision_model": {
        "image_size": 36,
        "num_frames": 4,
        "num_spatial_layers": 2,
        "num_temporal_layers": 1,
    },
    "vjepa2": {
        "crop_size": 16,
        "frames_per_clip": 4,
        "num_pooler_layers": 1,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 1,
    },
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    # It rounds widths up to multiples of 64.
    "xlstm": {"hidden_size": 128, "chunk_size": 16},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX", "de_DE"]},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}

# Where one head of a model type needs other fields than its others.
HEAD_FIELDS: dict[tuple[str, str], dict[str, Any]] = {
    ("reformer", "causal LM"): {"is_decoder": True},
}


def fields_of(model_type: str, head: str) -> dict[str, Any]:
    return {**FIELDS.get(model_type, {}), **HEAD_FIELDS.get((model_type, head), {})}
