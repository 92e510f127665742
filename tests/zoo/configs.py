"""Shrinks any configuration of transformers to toy size, by the names of its fields.

Sizes only ever get smaller, so that switches written as 0, -1 or None keep their
meaning. Of per-layer lists one layer of each kind is kept, so that a hybrid
model shows all its layers. What this cannot know stands in ``overrides.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
# Tokens from here on stand for images, sounds and the like, and are never drawn.
FIRST_SPECIAL_TOKEN = 64
PAD, BEGIN, END = 0, 1, 2
MOST_LAYERS = 6

_WIDTH, _INNER, _LAYERS, _HEADS, _HEAD_WIDTH, _POSITIONS = 32, 48, 2, 4, 8, 64

_SIZES_BY_FIELDS = (
    (VOCABULARY, "vocab_size src_vocab_size tgt_vocab_size unpadded_vocab_size vocab_size_per_layer_input "
    "t2u_vocab_size unit_hifi_gan_vocab_size entity_vocab_size"),
    (_WIDTH, "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size word_embed_proj_dim d_embed "
    "output_dim projection_dim backbone_hidden_size classifier_proj_size pooler_fc_size "
    "mamba_d_ssm attention_hidden_size hidden_size_global bottleneck_hidden_size output_hidden_size "
    "out_hidden_size decoder_hidden_size encoder_hidden_size rnn_width audio_embed_dim mm_embed_dim "
    "output_proj_dims cross_hidden_size vision_output_dim dim_model adapter_out_dim lru_width"),
    (_INNER, "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff d_inner n_inner hidden_dim dim_ff "
    "ffn_hidden_size dff moe_intermediate_size shared_expert_intermediate_size mlp_dim "
    "decoder_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size "
    "shared_intermediate_size intermediate_size_mlp mamba_intermediate_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size speech_encoder_intermediate_size "
    "t2u_encoder_ffn_dim t2u_decoder_ffn_dim dense_intermediate_size block_ff_dim mlp_hidden_size "
    "moe_ffn_hidden_size"),
    (_LAYERS, "num_hidden_layers encoder_layers decoder_layers n_layer n_layers num_layers num_decoder_layers "
    "num_encoder_layers decoder_num_hidden_layers encoder_num_hidden_layers conf_num_hidden_layers "
    "speech_encoder_layers t2u_encoder_layers t2u_decoder_layers depth num_adapter_layers "
    "num_global_layers num_blocks decoder_depth"),
    (_HEADS, "num_attention_heads encoder_attention_heads decoder_attention_heads n_head n_heads num_heads "
    "attention_heads decoder_num_attention_heads encoder_num_attention_heads conf_num_attention_heads "
    "swa_num_attention_heads index_n_heads speech_encoder_attention_heads t2u_encoder_attention_heads "
    "t2u_decoder_attention_heads cross_num_attention_heads linear_num_value_heads linear_num_heads "
    "mamba_num_heads n_mamba_heads num_local_experts num_experts n_routed_experts moe_num_experts "
    "mamba_n_heads num_routed_experts"),
    (2, "num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads swa_num_key_value_heads "
    "cross_num_key_value_heads linear_num_key_heads num_experts_per_tok moe_topk moe_k n_group topk_group "
    "n_groups mamba_n_groups num_experts_per_token num_global_key_value_heads topk_groups top_k_experts "
    "num_codebooks num_quantizers n_kv_heads num_kv_heads moe_top_k"),
    (1, "first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts moe_num_shared_experts"),
    (_HEAD_WIDTH, "head_dim qk_nope_head_dim v_head_dim swa_head_dim global_head_dim d_kv d_head kv_channels dim_head "
    "cross_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_dim "
    "mamba_head_dim ssm_state_size qk_rope_head_dim rotary_dim state_size mamba_d_state mamba_state_dim "
    "laurel_rank subsampling_conv_channels num_filters hidden_size_per_layer_input num_centroids mamba_headdim d_rel"),
    (4, "patch_size sliding_window attention_window window_size sliding_window_size index_topk expert_capacity "
    "relative_attention_num_buckets local_attention keep_window_size attention_chunk_size "
    "chunk_size mamba_chunk_size query_pre_attn_scalar centroid_intermediate_top_k local_attention_window_len"),
    (16, "kv_lora_rank q_lora_rank o_lora_rank image_size feature_projection_input_dim conv_channels input_feat_per_channel coordinate_size shape_size "
    "num_mel_bins mamba_dt_rank time_step_rank num_codevectors_per_group codevector_dim "
    "proj_codevector_dim decay_low_rank_dim gate_low_rank_dim num_conv_pos_embeddings num_codevectors "
    "position_embedding_size input_feat_size"),
    (_POSITIONS, "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions max_seq_len "
    "max_sequence_length max_2d_position_embeddings t2u_max_position_embeddings max_pos_emb"),
)  # fmt: skip
SIZES = {name: size for size, names in _SIZES_BY_FIELDS for name in names.split()}

# Stages of networks that are not all alike. One entry a stage, so lengths stay.
_STAGE_SIZES = {
    "depths": 1,
    "depth": 1,
    "stage_num_blocks": 1,
    "stage_numb_of_layers": 1,
    "n_attn_blocks": 1,
    "num_block_repeats": 1,
    "hidden_sizes": 16,
    "embed_dims": 16,
    "embed_dim": 16,
    "neck_hidden_sizes": 16,
    "base_attn_unit_dims": 16,
    "in_channels": 16,
    "out_channels": 16,
    "stage_in_channels": 16,
    "stage_mid_channels": 8,
    "stage_out_channels": 16,
    "num_heads": 2,
    "num_attention_heads": 2,
    "key_dim": 4,
    "tdnn_dim": 8,
}
# Feature extractors of raw sound: fewer layers, shorter strides.
_CONVOLUTIONS = {"conv_dim": (8, 8), "conv_stride": (3, 2), "conv_kernel": (4, 3)}

_FIXED = {
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_index": PAD,
    "bos_index": BEGIN,
    "eos_index": END,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    # Random masks and jitter would differ between the runs that are compared.
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
    "router_jitter_noise": 0.0,
    "classifier_dropout": 0.0,
}


def toy_config(model_type: str, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a model type at toy size; ``overrides`` holds fields, sub-configs as mappings."""
    return _shrink(CONFIG_MAPPING[model_type], CONFIG_MAPPING[model_type](), overrides)


def _shrink(
    config_class: type[PreTrainedConfig], default: PreTrainedConfig, overrides: Mapping[str, Any]
) -> PreTrainedConfig:
    """Builds the class anew from small values, so that fields derived from others are derived again."""
    # Not by getattr, which refuses to read fields that vary over layers.
    values = {
        f.name: vars(default)[f.name] for f in dataclasses.fields(config_class) if f.name in vars(default)
    }
    kept = _one_layer_of_each_kind(values)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _shrink(type(value), value, overrides.get(name, {}))
        elif name in _FIXED:
            small[name] = _FIXED[name]
        elif kept and _runs_over_layers(value, values):
            small[name] = type(value)(value[index] for index in kept)
        elif (new := _smaller(name, value)) is not value:
            small[name] = new
    if kept:
        small["num_hidden_layers"] = len(kept)
    if "num_attention_heads" in small and "num_key_value_heads" in values:
        # Written out where it is left open, and kept equal where it is, as latent attention needs.
        if values["num_key_value_heads"] in (None, values["num_attention_heads"]):
            small["num_key_value_heads"] = small["num_attention_heads"]
        if "head_dim" in values and values["head_dim"] is None:
            small["head_dim"] = _HEAD_WIDTH
    own = {n: v for n, v in overrides.items() if not isinstance(values.get(n), PreTrainedConfig)}
    config = config_class(**{**small, **own})
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = PAD
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = PAD
    return config


def _smaller(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, float) and "drop" in name:
        return 0.0
    if "drop" in name and isinstance(value, list | tuple) and all(isinstance(v, float) for v in value):
        return type(value)(0.0 for _ in value)
    if isinstance(value, int) and name in SIZES:
        return min(value, SIZES[name])
    if isinstance(value, list | tuple) and all(isinstance(entry, int) for entry in value):
        if name in _CONVOLUTIONS:
            return _CONVOLUTIONS[name]
        return type(value)(min(entry, _STAGE_SIZES.get(name, entry)) for entry in value)
    if isinstance(value, int) and value >= VOCABULARY and name.endswith(("token_id", "token_index")):
        # One special token a name, the same one in every sub-config.
        return FIRST_SPECIAL_TOKEN + sum(name.encode()) % (VOCABULARY - FIRST_SPECIAL_TOKEN)
    return value


def _runs_over_layers(value: Any, values: Mapping[str, Any]) -> bool:
    layers = values.get("num_hidden_layers")
    return isinstance(value, list | tuple) and isinstance(layers, int) and len(value) == layers > 1


def _one_layer_of_each_kind(values: Mapping[str, Any]) -> list[int]:
    """Indices of the layers to keep: the first of each kind that the per-layer lists tell apart, at least two."""
    lists = [v for n, v in values.items() if _runs_over_layers(v, values) and n.endswith(("types", "type"))]
    if not lists:
        return []
    kinds = list(zip(*(map(str, entries) for entries in lists), strict=True))
    kept = [index for index, kind in enumerate(kinds) if kinds.index(kind) == index][:MOST_LAYERS]
    return sorted({*kept, 0, 1}) if len(kept) < _LAYERS else kept
