"""Weights of openPangu-VL: from files into a model, and from a model into files."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from .._filling import check_dtype, check_tensors, fill_buffers, own_tensors
from .._safetensors import Stored, read_tensors, stored_tensors, write_tensors
from .keys import flat_name, get_targets, join_sources, split_names

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def write_weights(model: PreTrainedModel, path: Path, max_shard_size: int | str, split_qkv: bool) -> None:
    """Write a model's weights into an existing folder.

    Args:
        model: A [`WindowFreeViTModel`] or the composed model.
        path: The folder.
        max_shard_size: Largest size of a file.
        split_qkv: Whether the encoder's queries, keys and values are written one by one.
    """
    own = own_tensors(model)
    places, empty = {}, {}
    for target in get_targets(model, lambda name: split_qkv and len(split_names(name)) > 1):
        for index, source in enumerate(target.sources):
            places[source] = target, index
            empty[source] = torch.empty(target.shape, dtype=own[target.name].dtype, device="meta")

    def tensor(name: str) -> Tensor:
        target, index = places[name]
        return own[target.name].chunk(len(target.sources))[index].reshape(target.shape)

    write_tensors(path, empty, tensor, max_shard_size)


@torch.no_grad()
def fill_from(model: ModelT, folder: Path, dtype: torch.dtype | None, beside: tuple[str, ...]) -> ModelT:
    """Give a model the weights of a folder.

    Args:
        model: A model on the meta device.
        folder: The folder.
        dtype: Type of the weights; None keeps that of the files.
        beside: Beginnings of the flat names of tensors that are not read.

    Raises:
        ValueError: If the folder's tensors are not those of the model (names all), or if `dtype` is none of
            floating-point numbers.
    """
    check_dtype(dtype)
    stored, absent = stored_tensors(folder)
    names = _flat(stored)
    found = {flat: stored[name] for flat, name in names.items()}
    targets = get_targets(model, lambda name: name not in names and not names.keys().isdisjoint(split_names(name)))
    shapes = {source: target.shape for target in targets for source in target.sources}
    check_tensors(shapes, found, map(flat_name, absent), beside)

    by_source = {source: target for target in targets for source in target.sources}
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(folder, stored, [names[source] for source in by_source]):
        target = by_source[flat_name(name)]
        parts = waiting.setdefault(target.name, {})
        parts[flat_name(name)] = tensor if dtype is None else tensor.to(dtype)
        if len(parts) == len(target.sources):
            del waiting[target.name]
            owner, _, leaf = target.name.rpartition(".")
            whole = join_sources([parts[source] for source in target.sources], target.name)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(whole))
    model.tie_weights()
    fill_buffers(model)
    return model.eval()


def _flat(stored: dict[str, Stored]) -> dict[str, str]:
    """The names in a folder by flat name."""
    names: dict[str, str] = {}
    for name in stored:
        flat = flat_name(name)
        if flat in names:
            raise ValueError(f"`folder` must have each tensor once, got {names[flat]} and {name}.")
        names[flat] = name
    return names
