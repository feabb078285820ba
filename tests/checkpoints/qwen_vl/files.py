"""Small folders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, written by the native classes."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.parts.qwen_towers import TOWERS
from tests.tiny import order_one

MODELS: dict[str, tuple[type, type]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


def vision_fields(kind: str) -> dict[str, Any]:
    """The fields of a small tower."""
    return TOWERS[kind.removesuffix("_moe")].fields


def native_model(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A whole small model with weights of order one."""
    config_class, model_class = MODELS[kind]
    text = {**TEXT, **(EXPERTS if kind.endswith("moe") else {})}
    config = config_class(text_config=text, vision_config=vision_fields(kind), tie_word_embeddings=False)
    return order_one(model_class(config)).to(dtype).eval()


def save(native: PreTrainedModel, folder: Path, nested: bool | None = None) -> Path:
    """Save a model, under the names that transformers writes, or with the tower's names nested or not."""
    native.save_pretrained(folder)
    if nested is not None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        old, new = ("visual.", "model.visual.") if nested else ("model.visual.", "visual.")
        renamed = {(new + name.removeprefix(old) if name.startswith(old) else name): tensors[name] for name in tensors}
        assert any(name.startswith(new) for name in renamed)
        save_file(renamed, path, metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **vision: Any) -> dict[str, Any]:
    """Change fields of "vision_config"; None deletes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    fields = {**config["vision_config"], **vision}
    config["vision_config"] = {name: value for name, value in fields.items() if value is not None}
    path.write_text(json.dumps(config), encoding="utf-8")
    return config
