"""Folders of openPangu-VL with the published names, shapes and fields."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.checkpoints import files
from tests.checkpoints.files import decoder_layer_shapes, draw, layer_shapes

TINY: dict[str, Any] = {
    "architectures": ["OpenPanguVLForConditionalGeneration"],
    "model_type": "openpangu_vl",
    "auto_map": {"AutoConfig": "configuration_openpangu_vl.OpenPanguVLConfig"},
    "transformers_version": "4.52.4",
    "torch_dtype": "bfloat16",
    "bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vocab_size": 600,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "vision_start_token_id": 8,
    "vision_end_token_id": 9,
    "image_token_id": 10,
    "video_token_id": 11,
    "rope_scaling": {
        "rope_type": "default",
        "type": "default",
        "mrope_section": [2, 3, 3],
        "mrope_interleaved": True,
    },
    "vision_config": {
        "depth": 5,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-6,
        "in_chans": 3,
        "patch_size": 4,
        "spatial_patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1, 4],
        "out_hidden_size": 24,
        "tokens_per_second": 2,
    },
}
PUBLISHED: dict[str, Any] = {
    **TINY,
    "hidden_size": 4096,
    "intermediate_size": 12800,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 64000000.0,
    "max_position_embeddings": 131072,
    "max_window_layers": 34,
    "vocab_size": 153376,
    "eos_token_id": 45892,
    "vision_start_token_id": 45986,
    "vision_end_token_id": 46007,
    "image_token_id": 46005,
    "video_token_id": 144208,
    "rope_scaling": {**TINY["rope_scaling"], "mrope_section": [10, 27, 27]},
    "vision_config": {
        **TINY["vision_config"],
        "depth": 26,
        "hidden_size": 1536,
        "num_heads": 16,
        "intermediate_size": 4608,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [5, 12, 19, 25],
        "out_hidden_size": 3584,
    },
}
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "OpenPanguVLImageProcessorFast",
    "processor_class": "OpenPanguVLProcessor",
    "min_pixels": 1024,
    "max_pixels": 16384,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "any_res_dynamic_video_pixels": True,
    "any_res_max_video_total_pixels": 8192,
    "any_res_min_video_total_pixels": 256,
    "any_res_max_frame_pixels": 2048,
    "any_res_min_frame_pixels": 512,
}
GENERATION = {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [7], "do_sample": True, "temperature": 1e-6}
NESTED = {"visual.": "model.visual.", "model.": "model.language_model."}


def changed(config: dict[str, Any] = TINY, vision: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A config.json with some fields changed; None removes a field."""
    config = {**config, **fields, "vision_config": {**config["vision_config"], **(vision or {})}}
    config["vision_config"] = {name: value for name, value in config["vision_config"].items() if value is not None}
    return {name: value for name, value in config.items() if value is not None}


def encoder_shapes(config: dict[str, Any], split: bool = False) -> dict[str, tuple[int, ...]]:
    """The encoder's tensors, without mergers and projection."""
    vision = config["vision_config"]
    width, inner, side = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    patch = (width, vision["in_chans"], vision["temporal_patch_size"], side, side)
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": patch}
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}"
        shapes |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        if split:
            for part in "qkv":
                shapes |= layer_shapes(f"{block}.attn.{part}", width, width)
        else:
            shapes |= layer_shapes(f"{block}.attn.qkv", 3 * width, width)
        shapes |= layer_shapes(f"{block}.attn.proj", width, width)
        if vision["hidden_act"] == "silu":
            shapes |= layer_shapes(f"{block}.mlp.gate_proj", inner, width)
        shapes |= layer_shapes(f"{block}.mlp.up_proj", inner, width)
        shapes |= layer_shapes(f"{block}.mlp.down_proj", width, inner)
    return shapes | {"visual.final_layernorm.weight": (width,)}


def merger_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of mergers and projection."""
    vision = config["vision_config"]
    width, middle = vision["hidden_size"], vision["out_hidden_size"]
    cell = width * vision["spatial_merge_size"] ** 2
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(len(vision.get("mm_unit_vision_select_layer", [-1, -3]))):
        shapes[f"visual.merger.{index}.ln_q.weight"] = (width,)
        shapes |= layer_shapes(f"visual.merger.{index}.mlp.0", cell, cell)
        shapes |= layer_shapes(f"visual.merger.{index}.mlp.2", middle, cell)
    return shapes | layer_shapes("visual.vision_projection.fc1", config["hidden_size"], middle)


def text_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The text model's tensors, head included."""
    width, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= decoder_layer_shapes(config, layer)
        shapes |= layer_shapes(f"{layer}.mlp.gate_proj", inner, width, bias=False)
        shapes |= layer_shapes(f"{layer}.mlp.up_proj", inner, width, bias=False)
        shapes |= layer_shapes(f"{layer}.mlp.down_proj", width, inner, bias=False)
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (words, width)}


def all_tensors(config: dict[str, Any] = TINY, split: bool = False) -> dict[str, Tensor]:
    """Weights of a composed model."""
    return draw({**encoder_shapes(config, split), **merger_shapes(config), **text_shapes(config)})


def nested(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with the prefixes that transformers writes."""
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((flat for flat in NESTED if name.startswith(flat)), "")
        renamed[NESTED.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return renamed


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] = TINY) -> Path:
    """Write a checkpoint of four files."""
    return files.write_folder(folder, tensors, config)
