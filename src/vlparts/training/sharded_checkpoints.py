"""Checkpoints of a model that FSDP2 shards, in the files of a run that does not, so that either resumes the other."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.trainer import OPTIMIZER_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

__all__ = ["load_model", "load_optimizer", "save_optimizer"]

_SAVED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_LOADED = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def load_model(model: Any, folder: Path) -> None:
    """Load the weights of a checkpoint into a sharded model; all processes call it, and the first one reads.

    Args:
        model: The sharded model.
        folder: The checkpoint, with "model.safetensors" or its parts.

    Raises:
        ValueError: If the checkpoint has no such file.
    """
    state: dict[str, Any] = {}
    if dist.get_rank() == 0:
        names = [SAFE_WEIGHTS_NAME]
        if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            names = sorted(one.name for one in folder.glob("model-*-of-*.safetensors"))
        if not (folder / names[0]).is_file():
            raise ValueError(f"`resume`: the checkpoint {folder} has no {SAFE_WEIGHTS_NAME}.")
        for name in names:
            state |= load_file(folder / name)
        for name, source in model.all_tied_weights_keys.items():
            state.setdefault(name, state[source])
    set_model_state_dict(model, state, options=_LOADED)


def save_optimizer(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Save the state of an optimizer of sharded parameters; all processes call it, and the first one writes.

    Args:
        model: The sharded model.
        optimizer: The optimizer.
        folder: The checkpoint.
    """
    named: Any = get_optimizer_state_dict(model, optimizer, options=_SAVED)
    if dist.get_rank() != 0:
        return
    names = [name for group in named["param_groups"] for name in group["params"]]
    index = {name: place for place, name in enumerate(names)}
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in named["param_groups"]]
    state = {index[name]: values for name, values in named["state"].items()}
    torch.save({"state": state, "param_groups": groups}, folder / OPTIMIZER_NAME)


def load_optimizer(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load the state of an optimizer of sharded parameters; all processes call it, and the first one reads.

    Args:
        model: The sharded model.
        optimizer: The optimizer, with the groups of parameters that it was saved with.
        folder: The checkpoint.
    """
    named: dict[str, Any] = {}
    if dist.get_rank() == 0:
        saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        known = {id(one): name for name, one in fsdp2_canonicalize_names(dict(model.named_parameters())).items()}
        names = [known[id(one)] for group in optimizer.param_groups for one in group["params"]]
        groups = [{**group, "params": [names[place] for place in group["params"]]} for group in saved["param_groups"]]
        named = {"state": {names[place]: values for place, values in saved["state"].items()}, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, named, options=_LOADED)
