"""Small folders in both layouts of POINTS1.5, with names and shapes as the published code has them."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.checkpoints.files import draw, layer_shapes, write_folder
from tests.tiny import tokenizer

TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
WIDTH, INNER, LAYERS, HEADS, VOCAB = 32, 48, 2, 4, 512
VISION_WIDTH, VISION_LAYERS, MERGED = 32, 2, 128
VISION = {
    "model_type": "qwen2_vl",
    "depth": VISION_LAYERS,
    "embed_dim": VISION_WIDTH,
    "hidden_size": 40,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 2,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.02,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CUSTOM_LLAMA = {
    "model_type": "custom_llama",
    "hidden_size": WIDTH,
    "ffn_hidden_size": INNER,
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_kv_heads": 2,
    "hidden_act": "swiglu",
    "rotary_pct": 1.0,
    "rotary_emb_base": 500.0,
    "rotary_compress": 1.0,
    "norm_type": "rms_norm",
    "layernorm_epsilon": 1e-5,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "qkv_proj_bias": True,
    "out_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TEXTS = {"qwen2": QWEN2, "custom_llama": CUSTOM_LLAMA}


def config(layout: str, **changes: Any) -> dict[str, Any]:
    """A config.json; None as a value of `changes` leaves a field of "llm_config" out."""
    text = {name: value for name, value in {**TEXTS[layout], **changes}.items() if value is not None}
    return {
        "architectures": ["POINTSV15ChatModel"],
        "auto_map": {"AutoModel": "modeling_pointsv15_chat.POINTSV15ChatModel"},
        "model_type": "pointsv1.5_chat",
        "torch_dtype": "bfloat16",
        "vision_config": VISION,
        "llm_config": text,
    }


def shapes(text: dict[str, Any], merger: bool = True) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, written out as the published code has them."""
    named: dict[str, tuple[int, ...]] = {"vision_encoder.patch_embed.proj.weight": (VISION_WIDTH, 3, 2, 14, 14)}
    for layer in range(VISION_LAYERS):
        block = f"vision_encoder.blocks.{layer}."
        named |= {f"{block}norm{norm}.{kind}": (VISION_WIDTH,) for norm in (1, 2) for kind in ("weight", "bias")}
        named |= layer_shapes(f"{block}attn.qkv", 3 * VISION_WIDTH, VISION_WIDTH)
        named |= layer_shapes(f"{block}attn.proj", VISION_WIDTH, VISION_WIDTH)
        named |= layer_shapes(f"{block}mlp.fc1", 2 * VISION_WIDTH, VISION_WIDTH)
        named |= layer_shapes(f"{block}mlp.fc2", VISION_WIDTH, 2 * VISION_WIDTH)
    named |= _merger("vision_projector", WIDTH)
    if merger:
        named |= _merger("vision_encoder.merger", VISION["hidden_size"])
    return named | (_custom_llama(text) if text["model_type"] == "custom_llama" else _qwen2(text))


def _merger(prefix: str, out_features: int) -> dict[str, tuple[int, ...]]:
    norm = {f"{prefix}.ln_q.{kind}": (VISION_WIDTH,) for kind in ("weight", "bias")}
    return (
        norm | layer_shapes(f"{prefix}.mlp.0", MERGED, MERGED) | layer_shapes(f"{prefix}.mlp.2", out_features, MERGED)
    )


def _qwen2(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    keys = WIDTH // HEADS * text["num_key_value_heads"]
    named: dict[str, tuple[int, ...]] = {
        "llm.model.embed_tokens.weight": (VOCAB, WIDTH),
        "llm.model.norm.weight": (WIDTH,),
    }
    if not text["tie_word_embeddings"]:
        named["llm.lm_head.weight"] = (VOCAB, WIDTH)
    for layer in range(LAYERS):
        block = f"llm.model.layers.{layer}."
        named |= {f"{block}{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
        for name, rows in (("q", WIDTH), ("k", keys), ("v", keys)):
            named |= layer_shapes(f"{block}self_attn.{name}_proj", rows, WIDTH)
        named |= layer_shapes(f"{block}self_attn.o_proj", WIDTH, WIDTH, bias=False)
        named |= layer_shapes(f"{block}mlp.gate_proj", INNER, WIDTH, bias=False)
        named |= layer_shapes(f"{block}mlp.up_proj", INNER, WIDTH, bias=False)
        named |= layer_shapes(f"{block}mlp.down_proj", WIDTH, INNER, bias=False)
    return named


def _custom_llama(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    keys, bias = WIDTH // HEADS * text["num_kv_heads"], text["qkv_proj_bias"]
    named: dict[str, tuple[int, ...]] = {
        "llm.lm.embed_in.weight": (VOCAB, WIDTH),
        "llm.lm.final_layer_norm.weight": (WIDTH,),
        "llm.embed_out.weight": (VOCAB, WIDTH),
    }
    for layer in range(LAYERS):
        block = f"llm.lm.layers.{layer}."
        named |= {f"{block}{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
        if keys == WIDTH:
            named |= layer_shapes(f"{block}attention.query_key_value", 3 * WIDTH, WIDTH, bias)
        else:
            named |= layer_shapes(f"{block}attention.query_dense", WIDTH, WIDTH, bias)
            named |= layer_shapes(f"{block}attention.key_value_dense", 2 * keys, WIDTH, bias)
        named |= layer_shapes(f"{block}attention.dense", WIDTH, WIDTH, bias=False)
        named |= layer_shapes(f"{block}mlp.dense_h_to_4h", 2 * INNER, WIDTH, bias=False)
        named |= layer_shapes(f"{block}mlp.dense_4h_to_h", WIDTH, INNER, bias=False)
    return named


def points_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the tokens of images."""
    made = tokenizer()
    made.add_special_tokens({"extra_special_tokens": list(TOKENS)}, replace_extra_special_tokens=False)
    made.chat_template = None
    return made


def points_folder(path: Path, layout: str, merger: bool = True, **changes: Any) -> Path:
    """A folder with weights of order one and a tokenizer."""
    fields = config(layout, **changes)
    folder = write_folder(path, draw(shapes(fields["llm_config"], merger)), fields)
    points_tokenizer().save_pretrained(folder)
    return folder
