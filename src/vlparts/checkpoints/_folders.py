"""Folders of native checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

import transformers
from torch import nn

# By the class that a checkpoint names; by its model type if it names none.
_CLASSES = {
    "ViTModel": "ViTModel",
    "ViTForImageClassification": "ViTForImageClassification",
    "Siglip2Model": "Siglip2VisionModel",
    "Siglip2VisionModel": "Siglip2VisionModel",
    "Siglip2ForImageClassification": "Siglip2ForImageClassification",
    "vit": "ViTModel",
    "siglip2": "Siglip2VisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
}
# What a checkpoint may hold beside the tensors of the class.
_BESIDE = ("pooler.", "embeddings.mask_token", "text_model.", "logit_scale", "logit_bias")


def load_folder(folder: str | os.PathLike[str]) -> nn.Module:
    """Load a native checkpoint from a local folder, in the dtype that it is stored in.

    Args:
        folder: A folder with `config.json` and safetensors, as `save_pretrained` writes it.

    Raises:
        ValueError: If it is no such folder, if it holds another model, or if tensors are missing or unexpected.
        OSError: If there are no safetensors.
    """
    name = _CLASSES[_named_in(_read_config(folder))]
    options: dict[str, Any] = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, found = getattr(transformers, name).from_pretrained(
        os.fspath(folder),
        dtype="auto",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    missing = sorted(found["missing_keys"])
    unexpected = sorted(key for key in found["unexpected_keys"] if not key.startswith(_BESIDE))
    if missing or unexpected:
        raise ValueError(
            f"`source` must hold the tensors of {name} and no others, got {os.fspath(folder)!r}. "
            f"Missing: {', '.join(missing) or 'none'}. Unexpected: {', '.join(unexpected) or 'none'}."
        )
    return model


def _read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"`source` must be a module or a local folder with a config.json, got {os.fspath(folder)!r}.")
    return json.loads(path.read_text(encoding="utf-8"))


def _named_in(config: dict[str, Any]) -> str:
    """The key of `_CLASSES` for a configuration."""
    if "architecture" in config and "model_type" not in config:
        raise ValueError(
            "`source` must be a module for a timm checkpoint, got a folder: timm alone knows the options of "
            f"{config['architecture']!r}. Build it with timm.create_model, and pass the module."
        )
    names = [*(config.get("architectures") or ()), config.get("model_type")]
    if names[0] not in _CLASSES:
        raise ValueError(f"`source` must hold one of {', '.join(_CLASSES)}, got {names[0]!r}.")
    return str(names[0])
