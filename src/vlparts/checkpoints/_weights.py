"""Weights of published folders: load them into a model, and save them from one.

A published tensor is one of the model's tensors in another shape, or a slice of one.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ..parts.utils import mark_initialized
from ._safetensors import FLOATING, StoredTensor, StoredTensors, write_tensors

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

# Names of the text model's rotary buffers, which old versions of transformers saved. They follow from config.json.
ROTARY_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"


class Slice(NamedTuple):
    """The part of a model's tensor that a published tensor holds.

    Attributes:
        name: The name of the model's tensor.
        get_view: Returns the part, in the published shape, as a view of the model's tensor. None for all of it.
    """

    name: str
    get_view: Callable[[Tensor], Tensor] | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The part as a view.

        Args:
            tensors: The model's tensors by name.
        """
        tensor = tensors[self.name]
        return tensor if self.get_view is None else self.get_view(tensor)


def published_name(name: str, patterns: Iterable[tuple[str, str]], family: str) -> str:
    """The published name of a model's tensor.

    Args:
        name: The name in the model.
        patterns: Regular expressions of names in the model, each with the published name as a replacement; the first
            that matches all of a name counts.
        family: The name of the published model.

    Raises:
        ValueError: If none matches.
    """
    for pattern, published in patterns:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(published)
    raise ValueError(f"`model` has a tensor {name!r}, for which {family} has no name.")


_EXPERTS = re.compile(r"(.+\.experts\.)(gate_up_proj|down_proj)")


def expert_slices(name: str, published: str, experts: int) -> dict[str, Slice]:
    """The parts of stacked experts that published tensors hold, one for each expert and projection.

    Published files have `gate_proj`, `up_proj` and `down_proj` of each expert; the model has `gate_up_proj`
    `(E, 2I, H)` and `down_proj` `(E, H, I)`.

    Args:
        name: Name of the model's tensor.
        published: Its name with the published prefix.
        experts: Number E of experts.

    Returns:
        The parts by published name; empty for a tensor that is not of stacked experts.
    """
    match = _EXPERTS.fullmatch(published)
    if match is None:
        return {}
    projections = ["down_proj"] if match[2] == "down_proj" else ["gate_proj", "up_proj"]
    return {
        f"{match[1]}{expert}.{projection}.weight": Slice(
            name, partial(_expert_rows, expert=expert, index=index, count=len(projections))
        )
        for expert in range(experts)
        for index, projection in enumerate(projections)
    }


def _expert_rows(stacked: Tensor, expert: int, index: int, count: int) -> Tensor:
    """The rows of one of `count` projections of an expert."""
    return stacked[expert].chunk(count)[index]


def check_dtype(dtype: Any) -> None:
    """Raise ValueError unless it is None or a floating-point dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point torch.dtype or None, got {dtype!r}.")


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model by name, without a head that is tied to the embeddings."""
    tensors = model.state_dict()
    if getattr(model.config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    return tensors


@torch.no_grad()
def load_weights(
    model: ModelT,
    slices: Mapping[str, Slice],
    stored: StoredTensors,
    *,
    dtype: torch.dtype | None = None,
    ignored: tuple[str, ...] = (),
    map_files: bool = False,
) -> ModelT:
    """Load the weights of a published folder, file by file.

    Args:
        model: A model on the meta device.
        slices: The part of the model that each published tensor holds, by published name.
        stored: The folder's tensors.
        dtype: Floating-point dtype of the weights; None keeps that of each tensor in the files.
        ignored: Regular expressions of the complete names of tensors that may be in the folder and are not read.
        map_files: Use published tensors without a copy where they are complete tensors of the model in the requested
            dtype; they stay mapped from the files. False copies all: memory holds the model and the tensor being read.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If tensors do not fit (lists all of them before any is read), or if one tensor of the model has
            parts of several dtypes and `dtype` is None.
    """
    own = own_tensors(model)
    check_tensors({name: tuple(part.of(own).shape) for name, part in slices.items()}, stored, ignored)
    dtypes = _stored_dtypes(slices, stored.tensors) if dtype is None else dict.fromkeys(own, dtype)
    counts = Counter(part.name for part in slices.values())
    allocated: dict[str, Tensor] = {}
    for published, tensor in stored.read(slices):
        name = slices[published].name
        if map_files and counts[name] == 1:
            _set_parameter(model, name, tensor.to(dtypes[name]).reshape(own[name].shape))
            continue
        if name not in allocated:
            allocated[name] = torch.empty_like(own[name], dtype=dtypes[name], device="cpu")
            _set_parameter(model, name, allocated[name])
        slices[published].of(allocated).copy_(tensor)
    model.tie_weights()
    _init_buffers(model)
    mark_initialized(model)
    return model.eval()


def save_weights(model: PreTrainedModel, slices: Mapping[str, Slice], folder: Path, max_shard_size: int | str) -> None:
    """Save weights under published names, file by file and in their own dtypes.

    Args:
        model: The model.
        slices: As in [`load_weights`].
        folder: An existing folder.
        max_shard_size: As in [`write_tensors`].
    """
    own = own_tensors(model)
    meta = {name: part.of({part.name: own[part.name].to("meta")}) for name, part in slices.items()}
    write_tensors(folder, meta, lambda name: slices[name].of(own), max_shard_size)


def check_tensors(expected: Mapping[str, tuple[int, ...]], stored: StoredTensors, ignored: tuple[str, ...]) -> None:
    """Compare the tensors that a model needs with those of a folder.

    Args:
        expected: The shapes of the tensors that the model needs, by published name.
        stored: The folder's tensors.
        ignored: As in [`load_weights`].

    Raises:
        ValueError: If tensors are missing, unexpected, of another shape or not of a floating-point dtype; lists all.
    """
    found = stored.tensors
    skip = re.compile("|".join(ignored) or r"(?!)")
    absent = {name for name in stored.absent if not skip.fullmatch(name)}
    common = expected.keys() & found.keys()
    problems = {
        "Missing": (expected.keys() - found.keys()) | absent,
        "Unexpected": {name for name in found.keys() - expected.keys() if not skip.fullmatch(name)},
        "Wrong shape": {
            f"{name} {found[name].shape} instead of {expected[name]}"
            for name in common
            if found[name].shape != expected[name]
        },
        "Not floating-point": {f"{name} {found[name].dtype}" for name in common if found[name].dtype not in FLOATING},
    }
    if any(problems.values()):
        listed = " ".join(f"{problem}: {', '.join(sorted(names)) or 'none'}." for problem, names in problems.items())
        raise ValueError(f"`folder` must have the tensors that its config.json describes and no others. {listed}")


def _stored_dtypes(slices: Mapping[str, Slice], found: Mapping[str, StoredTensor]) -> dict[str, torch.dtype]:
    """The dtype of each of the model's tensors in the files."""
    dtypes: dict[str, set[str]] = {}
    for published, part in slices.items():
        dtypes.setdefault(part.name, set()).add(found[published].dtype)
    mixed = sorted(f"{name} of {', '.join(sorted(kinds))}" for name, kinds in dtypes.items() if len(kinds) > 1)
    if mixed:
        raise ValueError(
            "`dtype` must be given for a `folder` that has parts of one tensor in several dtypes, got None and "
            f"{'; '.join(mixed)}."
        )
    return {name: FLOATING[kinds.pop()] for name, kinds in dtypes.items()}


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor))


def _init_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers, which no file holds, and set the dtype of the configurations to that of the weights."""
    models = [cast(PreTrainedModel, module) for module in model.modules() if isinstance(module, PreTrainedModel)]
    for owner in reversed(models):  # a part before the model that holds it: only the part can compute its buffers
        for module in owner.modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                owner._init_weights(module)
        owner.config.dtype = owner.dtype
