"""Published Pangu Pro MoE folders to models and back."""

import os
from pathlib import Path

import torch

from ...parts.modeling_moge import MoGEForCausalLM
from .._folder import new_folder, read_generation_config, write_config
from .._safetensors import check_max_shard_size, list_tensors
from .._weights import ROTARY_BUFFERS, Slice, check_dtype, expert_slices, load_weights, own_tensors, save_weights
from .config import published_config, read_config

PathLike = str | os.PathLike[str]

_ROUTER_SCALE = ".mlp.gate.router_scale"


def model_from_pangu_pro_moe(folder: PathLike, *, dtype: torch.dtype | None = None) -> MoGEForCausalLM:
    """Build a Pangu Pro MoE with the weights of a folder.

    Each tensor is allocated once and filled from the files: memory holds the model and half a gigabyte. Rotary buffers
    (`rotary_emb.inv_freq`) of old exports are not read. Generation options come from generation_config.json, if there
    is one. The model is in evaluation mode.

    Args:
        folder: A local folder with config.json and safetensors under the published names.
        dtype: Floating-point dtype of the weights; None keeps that of the files.

    Raises:
        ValueError: If it is no such folder, if it holds another model or quantized weights, if a field is missing or
            does not fit, if there are pickled weights only, if the index names a file that does not exist, or if
            tensors are missing, unexpected or of another shape or dtype (lists all of them).
    """
    check_dtype(dtype)
    path = Path(folder)
    config, generation = read_config(path), read_generation_config(path)
    with torch.device("meta"):
        model = MoGEForCausalLM(config)
    model = load_weights(model, get_slices(model), list_tensors(path), dtype=dtype, ignored=(ROTARY_BUFFERS,))
    model.generation_config = generation or model.generation_config
    return model


def to_pangu_pro_moe(model: MoGEForCausalLM, folder: PathLike, *, max_shard_size: int | str = "5GB") -> None:
    """Write a folder with the published names: config.json, generation_config.json, safetensors and their index.

    The weights keep their dtypes and are written file by file without a second copy of the model. Code and tokenizer
    are not written; copy them from the published folder. After an error, nothing is left in the folder.

    Args:
        model: The model.
        folder: A new or empty folder.
        max_shard_size: Largest size of a file, in bytes or like "5GB".

    Raises:
        ValueError: If `max_shard_size` is no size, if the folder is not empty, if the model is of another class, or
            if it has an option that Pangu Pro MoE does not have.
    """
    if not isinstance(model, MoGEForCausalLM):
        raise ValueError(f"`model` must be a MoGEForCausalLM, got {type(model).__name__}.")
    check_max_shard_size(max_shard_size)
    fields = published_config(model.config)
    with new_folder(folder) as path:
        save_weights(model, get_slices(model), path, max_shard_size)
        model.generation_config.save_pretrained(path)
        write_config(path, fields, model.dtype)


def get_slices(model: MoGEForCausalLM) -> dict[str, Slice]:
    """The part of the model that each published tensor holds, by published name.

    Args:
        model: The model, on any device.
    """
    slices: dict[str, Slice] = {}
    for name, tensor in own_tensors(model).items():
        experts = expert_slices(name, name, tensor.shape[0])
        slices |= experts or {name.replace(_ROUTER_SCALE, ".mlp.router_scale"): Slice(name)}
    return slices
