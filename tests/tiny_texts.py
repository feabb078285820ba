"""A small configuration of every text model that `AutoModelForCausalLM` knows."""

import inspect
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Names of different families for the same sizes.
_SIZES: dict[tuple[str, ...], Any] = {
    ("vocab_size",): 64,
    ("pad_token_id",): 0,
    ("bos_token_id",): 1,
    ("eos_token_id",): 2,
    ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"): 32,
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"): 2,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"): 4,
    ("encoder_layers", "num_encoder_layers", "encoder_attention_heads"): 2,
    ("num_key_value_heads", "n_mamba_heads"): 2,
    ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "ffn_hidden_size"): 48,
    ("max_position_embeddings", "max_seq_len", "n_positions"): 64,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "moe_topk"): 2,
    ("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_shared_experts"): 1,
    ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"): 16,
    ("q_lora_rank", "kv_lora_rank", "mamba_headdim", "linear_head_dim"): 16,
    ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"): 8,
    ("linear_key_head_dim", "linear_value_head_dim"): 8,
    ("linear_num_key_heads", "mamba_expand"): 2,
    ("linear_num_value_heads", "linear_num_heads", "rotary_dim"): 4,
    ("mamba_d_ssm",): 64,
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "state_size", "mamba_num_heads", "mamba_head_dim"): 8,
    ("ssm_state_size",): 8,
    ("zero_expert_num",): 0,
    # Numbers that change logits and embeddings where a family has them.
    ("final_logit_softcapping",): 5.0,
    ("logit_scale", "logits_scaling", "lm_head_multiplier", "embedding_multiplier"): 0.7,
    ("dim_model_base",): 16,
    ("hidden_size_per_layer_input", "vocab_size_per_layer_input"): 64,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_BLT_PART = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "head_dim": 8,
}
_CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bailing_hybrid", "kimi_linear", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _HYBRID),
    "bamba": {"attn_layer_indices": [1]},
    "blt": dict.fromkeys(("patcher_config", "encoder_config", "decoder_config", "global_config"), _BLT_PART),
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), {"layer_types": ["conv", "full_attention"]}),
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "moshi": {
        "audio_vocab_size": 16,
        "depth_decoder_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "input_size": 32,
        },
    },
    "qwen4_exp_text": {
        **_HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_text_config(kind: str) -> PreTrainedConfig:
    """A configuration of two layers of width 32 and 64 tokens."""
    config_class = CONFIG_MAPPING[kind]
    taken = inspect.signature(config_class.__init__).parameters.keys() | getattr(
        config_class, "__dataclass_fields__", {}
    )
    aliases = getattr(config_class, "attribute_map", {})
    fields: dict[str, Any] = {}
    for names, value in _SIZES.items():
        fields |= {found: value for name in names if (found := name if name in taken else aliases.get(name)) in taken}
    if "qk_rope_head_dim" in taken:  # latent attention: the head has two parts
        fields.pop("head_dim", None)
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return config_class(**{**fields, **_CHANGES.get(kind, {})})
