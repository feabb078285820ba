"""What the readers and writers of published folders share: checks, and what becomes of a model without weights."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ._safetensors import Stored

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_dtype(dtype: Any) -> None:
    """Raise ValueError unless it is None or a floating-point type."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point torch.dtype or None, got {dtype!r}.")


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder to write to, which is not made here.

    Raises:
        ValueError: If there is a file, or a folder that is not empty: a model may be mapped from what stands there.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got {str(path)!r}.")
    return path


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model by name, without a head that shares the embeddings."""
    tensors = model.state_dict()
    if getattr(model.config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    return tensors


def check_tensors(
    wanted: dict[str, tuple[int, ...]], found: dict[str, Stored], absent: Iterable[str], beside: tuple[str, ...] = ()
) -> None:
    """Compare what a model needs with what a folder holds.

    Args:
        wanted: The shapes of the tensors that the model needs, by the folder's names.
        found: The folder's tensors.
        absent: Names in the folder's index that none of its files holds.
        beside: Beginnings of the names of tensors that are left alone.

    Raises:
        ValueError: If tensors are missing, unexpected, of another shape or no floating-point numbers; names all.
    """
    here = {name: found[name] for name in wanted.keys() & found.keys()}
    lists: dict[str, Iterable[str]] = {
        "Missing": (wanted.keys() - found.keys()) | {name for name in absent if not name.startswith(beside)},
        "Unexpected": [name for name in found.keys() - wanted.keys() if not name.startswith(beside)],
        "Of another shape": [
            f"{name} {one.shape} for {wanted[name]}" for name, one in here.items() if one.shape != wanted[name]
        ],
        "Of another type": [f"{name} {one.dtype}" for name, one in here.items() if one.dtype not in FLOATING],
    }
    if any(lists.values()):
        said = " ".join(f"{what}: {', '.join(sorted(names)) or 'none'}." for what, names in lists.items())
        raise ValueError(f"`folder` must have the tensors that its config.json describes and no others. {said}")


def fill_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no file holds, and note the type of the weights in the configurations."""
    models = [cast(PreTrainedModel, module) for module in model.modules() if isinstance(module, PreTrainedModel)]
    for owner in reversed(models):  # a part before what holds it, since it knows its own buffers
        for module in owner.modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                owner._init_weights(module)
        owner.config.dtype = owner.dtype
