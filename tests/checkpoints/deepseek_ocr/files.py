"""Small folders in DeepSeek-OCR's published layout, with the fields of its config.json and all tensor names."""

import torch
from torch import Tensor

LANGUAGE = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "kv_lora_rank": None,
    "lm_head": True,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "rm_head": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "use_mla": False,
    "v_head_dim": 0,
    "vocab_size": 64,
}
CONFIG = {
    "architectures": ["DeepseekOCRForCausalLM"],
    "auto_map": {"AutoModel": "modeling_deepseekocr.DeepseekOCRForCausalLM"},
    "candidate_resolutions": [[1024, 1024]],
    "global_view_pos": "head",
    "language_config": {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", **LANGUAGE},
    "model_type": "deepseek_vl_v2",
    "projector_config": {"input_dim": 96, "model_type": "mlp_projector", "n_embed": 32, "projector_type": "linear"},
    "tile_tag": "2D",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "vision_config": {
        "image_size": 128,
        "mlp_ratio": 3.7362,
        "model_name": "deeplip_b_l",
        "model_type": "vision",
        "width": {
            "clip-l-14-224": {"heads": 4, "image_size": 28, "layers": 2, "patch_size": 14, "width": 48},
            "sam_vit_b": {
                "downsample_channels": [24, 48],
                "global_attn_indexes": [1],
                "heads": 2,
                "layers": 2,
                "width": 32,
            },
        },
    },
    **LANGUAGE,
}
TOKENIZER = {
    "added_tokens": [{"id": 7, "content": "<image>"}, {"id": 8, "content": "<td>"}, {"id": 9, "content": "</td>"}]
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by published name, written out as the published code has them."""
    sam, clip, text = "model.sam_model.", "model.vision_model.", "model."
    named: dict[str, tuple[int, ...]] = {
        f"{sam}patch_embed.proj.weight": (32, 3, 16, 16),
        f"{sam}patch_embed.proj.bias": (32,),
        f"{sam}pos_embed": (1, 8, 8, 32),
        f"{sam}neck.0.weight": (256, 32, 1, 1),
        f"{sam}neck.1.weight": (256,),
        f"{sam}neck.1.bias": (256,),
        f"{sam}neck.2.weight": (256, 256, 3, 3),
        f"{sam}neck.3.weight": (256,),
        f"{sam}neck.3.bias": (256,),
        f"{sam}net_2.weight": (24, 256, 3, 3),
        f"{sam}net_3.weight": (48, 24, 3, 3),
        f"{clip}embeddings.class_embedding": (48,),
        f"{clip}embeddings.patch_embedding.weight": (48, 3, 14, 14),
        f"{clip}embeddings.position_embedding.weight": (5, 48),
        f"{clip}pre_layrnorm.weight": (48,),
        f"{clip}pre_layrnorm.bias": (48,),
        f"{text}projector.layers.weight": (32, 96),
        f"{text}projector.layers.bias": (32,),
        f"{text}image_newline": (32,),
        f"{text}view_seperator": (32,),
        f"{text}embed_tokens.weight": (64, 32),
        f"{text}norm.weight": (32,),
        "lm_head.weight": (64, 32),
    }
    for layer in range(2):
        block, rows = f"{sam}blocks.{layer}.", 15 if layer == 1 else 27
        named |= {f"{block}attn.rel_pos_{axis}": (rows, 16) for axis in "hw"}
        named |= _linear(f"{block}attn.qkv", 96, 32) | _linear(f"{block}attn.proj", 32, 32)
        named |= _linear(f"{block}mlp.lin1", 128, 32) | _linear(f"{block}mlp.lin2", 32, 128)
        named |= {f"{block}norm{norm}.{kind}": (32,) for norm in (1, 2) for kind in ("weight", "bias")}
        block = f"{clip}transformer.layers.{layer}."
        named |= _linear(f"{block}self_attn.qkv_proj", 144, 48) | _linear(f"{block}self_attn.out_proj", 48, 48)
        named |= _linear(f"{block}mlp.fc1", 192, 48) | _linear(f"{block}mlp.fc2", 48, 192)
        named |= {f"{block}layer_norm{norm}.{kind}": (48,) for norm in (1, 2) for kind in ("weight", "bias")}
        block = f"{text}layers.{layer}."
        named |= {f"{block}{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        named |= {f"{block}self_attn.{one}_proj.weight": (32, 32) for one in "qkvo"}
    named |= _mlp(f"{text}layers.0.mlp.", 48)
    named |= _mlp(f"{text}layers.1.mlp.shared_experts.", 32)
    named[f"{text}layers.1.mlp.gate.weight"] = (4, 32)
    for expert in range(4):
        named |= _mlp(f"{text}layers.1.mlp.experts.{expert}.", 16)
    return named


def _linear(name: str, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _mlp(name: str, width: int) -> dict[str, tuple[int, ...]]:
    up = {f"{name}{one}_proj.weight": (width, 32) for one in ("gate", "up")}
    return up | {f"{name}down_proj.weight": (32, width)}


def tensors() -> dict[str, Tensor]:
    """All tensors in bfloat16, of order one."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, shape in shapes().items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        drawn[name] = (torch.randn(shape, generator=generator) * scale).bfloat16()
    return drawn
