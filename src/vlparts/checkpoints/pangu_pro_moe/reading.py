"""Read published Pangu Pro MoE folders, and write them."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ...parts.modeling_moge import MoGEForCausalLM
from .._filling import check_dtype, check_tensors, fill_buffers, new_folder, own_tensors
from .._safetensors import read_tensors, stored_tensors, write_tensors
from .config import published_config, read_config
from .keys import get_places, stored_types

PathLike = str | os.PathLike[str]


@torch.no_grad()
def model_from_pangu_pro_moe(folder: PathLike, *, dtype: torch.dtype | None = None) -> MoGEForCausalLM:
    """Build a Pangu Pro MoE with the weights of a folder.

    Each tensor is allocated once, and filled file after file: memory holds the model and, at most, one file. Options
    of generation come from generation_config.json, if there is one. The model is in evaluation mode.

    Args:
        folder: A local folder with config.json and safetensors under the published names.
        dtype: Floating-point type of the weights; None keeps that of the files.

    Raises:
        ValueError: If it is no such folder, if it holds another model or quantised weights, if a field is missing or
            does not fit, if there are pickled weights only, if the index names a file that does not exist, or if
            tensors are missing, unexpected or of another shape or type (names all of them).
    """
    check_dtype(dtype)
    path = Path(folder)
    config = read_config(path)
    stored, absent = stored_tensors(path)
    with torch.device("meta"):
        model = MoGEForCausalLM(config)
    own, places = own_tensors(model), get_places(model)
    check_tensors({name: tuple(place.view(own[place.name]).shape) for name, place in places.items()}, stored, absent)
    types = stored_types(places, stored) if dtype is None else dict.fromkeys(own, dtype)

    filled: dict[str, Tensor] = {}
    for published, tensor in read_tensors(path, stored, places):
        place = places[published]
        if place.name not in filled:
            filled[place.name] = _allocate(model, place.name, types[place.name])
        place.view(filled[place.name]).copy_(tensor)
    model.tie_weights()
    fill_buffers(model)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model.eval()


def _allocate(model: MoGEForCausalLM, name: str, dtype: torch.dtype) -> Tensor:
    """Give a model memory for a parameter that is on the meta device."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = nn.Parameter(torch.empty_like(getattr(module, leaf), dtype=dtype, device="cpu"))
    setattr(module, leaf, parameter)
    return parameter.data


@torch.no_grad()
def to_pangu_pro_moe(model: MoGEForCausalLM, folder: PathLike, *, max_shard_size: int | str = "5GB") -> None:
    """Write a folder with the published names: config.json, generation_config.json, safetensors and their index.

    The weights keep their types, and are written file after file without a second copy of the model. Code and
    tokenizer are not written; copy them from the published folder.

    Args:
        model: The model.
        folder: A new or empty folder.
        max_shard_size: Largest size of a file, in bytes or like "5GB".

    Raises:
        ValueError: If the folder is not empty, or if the model is another or has an option that Pangu Pro MoE has not.
    """
    if not isinstance(model, MoGEForCausalLM):
        raise ValueError(f"`model` must be a MoGEForCausalLM, got {type(model).__name__}.")
    path = new_folder(folder)
    fields = published_config(model.config)
    own, places = own_tensors(model), get_places(model)
    empty = {name: place.view(own[place.name].to("meta")) for name, place in places.items()}
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path, empty, lambda name: places[name].view(own[places[name].name]), max_shard_size)
    model.generation_config.save_pretrained(path)
    text = json.dumps({**fields, "torch_dtype": str(model.dtype).removeprefix("torch.")}, indent=2, sort_keys=True)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")
