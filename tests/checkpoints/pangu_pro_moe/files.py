"""Folders of Pangu Pro MoE with the names, shapes and fields that public inference code reads."""

from typing import Any

import torch
from torch import Tensor

from tests.checkpoints.files import decoder_layer_shapes, draw

TINY: dict[str, Any] = {
    "architectures": ["PanguProMoEForCausalLM"],
    "model_type": "PanguProMoE",
    "auto_map": {"AutoConfig": "configuration_pangu_moe.PanguProMoEConfig"},
    "torch_dtype": "bfloat16",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "tie_word_embeddings": False,
}
PUBLISHED: dict[str, Any] = {
    **TINY,
    "vocab_size": 153376,
    "hidden_size": 5120,
    "moe_intermediate_size": 1344,
    "shared_expert_intermediate_size": 5376,
    "num_hidden_layers": 48,
    "mlp_only_layers": [],
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
GENERATION = {"bos_token_id": 1, "eos_token_id": [7], "do_sample": True, "temperature": 0.6}


def changed(**fields: Any) -> dict[str, Any]:
    """The small config.json with some fields changed; None removes a field."""
    return {name: value for name, value in {**TINY, **fields}.items() if value is not None}


def mlp_shapes(prefix: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """A gated MLP's tensors."""
    return {
        f"{prefix}.gate_proj.weight": (inner, width),
        f"{prefix}.up_proj.weight": (inner, width),
        f"{prefix}.down_proj.weight": (width, inner),
    }


def all_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model."""
    width, words = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= decoder_layer_shapes(config, layer)
        if index in config["mlp_only_layers"]:
            shapes |= mlp_shapes(f"{layer}.mlp", width, config["intermediate_size"])
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (config["num_experts"], width)
        shapes[f"{layer}.mlp.router_scale"] = (1, config["num_experts"])
        for expert in range(config["num_experts"]):
            shapes |= mlp_shapes(f"{layer}.mlp.experts.{expert}", width, config["moe_intermediate_size"])
        if config["shared_expert_intermediate_size"]:
            shapes |= mlp_shapes(f"{layer}.mlp.shared_expert", width, config["shared_expert_intermediate_size"])
    shapes["model.norm.weight"] = (width,)
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": (words, width)}


def all_tensors(config: dict[str, Any] = TINY) -> dict[str, Tensor]:
    """bfloat16 weights of a model, with values whose bits a dtype conversion would change."""
    tensors = draw(all_shapes(config))
    bits = tensors["model.layers.0.mlp.experts.5.up_proj.weight"].view(torch.int16)
    bits[3, :3] = torch.tensor([0x7FA1, -0x8000, 1], dtype=torch.int16)  # a NaN with a payload, -0, the smallest
    return tensors
