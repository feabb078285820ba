"""Start a NaViT from the weights of another vision transformer."""

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from ...parts.configuration_navit import NaViTConfig
from ...parts.modeling_navit import NaViTForImageClassification, NaViTModel
from .._folders import load_folder
from ..conversion import Recipe
from . import native as native_vit
from . import siglip2
from .naflexvit import is_naflexvit, read_naflexvit
from .resampling import resample_tables

logger = logging.getLogger(__name__)

POOLINGS = get_args(NaViTConfig.__annotations__["pooling"])
LABEL_FIELDS = {"id2label", "label2id", "problem_type"}
# How tables are read and what labels are called may change; what the source's weights fix may not.
CHANGEABLE = {"position_coordinates", "position_interpolation", *LABEL_FIELDS}


@torch.no_grad()
def from_vit(
    source: nn.Module | str | os.PathLike[str],
    *,
    max_grid_size: int | None = None,
    pooling: str | None = None,
    **changes: Any,
) -> NaViTModel | NaViTForImageClassification:
    """Build a NaViT with the weights of a ViT, a Siglip2 (NaFlex) or a timm NaFlexVit.

    The NaViT computes what the source does, for images of any size. It has the source's dtypes and device, shares no
    memory with it, and is in evaluation mode. What is left out of the source and what is new is logged as a warning.

    Args:
        source: A `ViTModel` or `ViTForImageClassification`; a `Siglip2VisionModel`, a `Siglip2Model` (its vision tower
            is taken) or `Siglip2ForImageClassification`; a timm `NaFlexVit`; or the folder of a checkpoint of one of
            the former, with safetensors.
        max_grid_size: Rows N of the position tables. None keeps the source's, which must be square then. Tables of
            another size are resampled to N x N as `position_interpolation` says: where that is left as it is, an
            image of N x N patches gets what the source would make for it.
        pooling: As in [`NaViTConfig`]. None keeps the source's. With another one, a class token stays, as a register,
            so that the patches come out the same; a head "map" that the source does not have is new.
        **changes: Other fields of [`NaViTConfig`] that the weights do not fix, for example `spatial_merge_size` or
            `max_frames` (whose table is new).

    Returns:
        A `NaViTForImageClassification` if the source has a classifier, else a `NaViTModel`.

    Raises:
        ValueError: If the source is of another kind, uses something that NaViT does not have (the message names the
            option), or has tensors too many or too few; if a field is unknown or fixed by the weights.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)} or None, got {pooling!r}.")
    module = load_folder(source) if isinstance(source, (str, os.PathLike)) else source
    recipe = _reader(module)(module, pooling)
    config = _config(recipe, max_grid_size, changes)
    tensors = module.state_dict()
    weights = resample_tables(recipe.apply(tensors), config)
    model = _build(recipe, config, weights)
    _report(recipe, tensors, model, weights)
    return model.eval()


def _reader(source: object) -> Callable[[Any, str | None], Recipe]:
    if isinstance(source, native_vit.SOURCES):
        return native_vit.read_vit
    if isinstance(source, siglip2.SOURCES):
        return siglip2.read_siglip2
    if is_naflexvit(source):
        return read_naflexvit
    kinds = [kind.__name__ for kind in (*native_vit.SOURCES, *siglip2.SOURCES)]
    raise ValueError(
        f"`source` must be a {', '.join(kinds)}, timm NaFlexVit or the folder of a checkpoint, "
        f"got {type(source).__module__}.{type(source).__name__}."
    )


def _config(recipe: Recipe, max_grid_size: int | None, changes: dict[str, Any]) -> NaViTConfig:
    fixed = recipe.fields.keys() - CHANGEABLE
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    known = {field.name for field in dataclasses.fields(NaViTConfig)} - inherited | LABEL_FIELDS
    for name, value in changes.items():
        if name in fixed:
            raise ValueError(
                f"`{name}` is {recipe.fields[name]!r} in `source` and must not be changed, got {value!r}."
            )
        if name not in known:
            raise ValueError(f"`changes` must be fields of NaViTConfig, got {name!r}.")
    return NaViTConfig(**{**recipe.fields, **_size(recipe, max_grid_size), **changes})


def _size(recipe: Recipe, max_grid_size: int | None) -> dict[str, int]:
    """The field `max_grid_size`, if there are tables."""
    if recipe.grid is None:
        if max_grid_size is not None:
            raise ValueError(f"`max_grid_size` must be None for a `source` without tables, got {max_grid_size}.")
        return {}
    rows, columns = recipe.grid
    if max_grid_size is None and rows != columns:
        raise ValueError(
            f"`max_grid_size` must be given to resample the tables of `source`, which are not square: its "
            f"`{recipe.grid_option}` makes {rows} x {columns} patches."
        )
    return {"max_grid_size": rows if max_grid_size is None else max_grid_size}


def _build(
    recipe: Recipe, config: NaViTConfig, weights: dict[str, Tensor]
) -> NaViTModel | NaViTForImageClassification:
    """A model with the weights; what they do not hold is drawn."""
    example = weights["norm.weight"]
    with torch.device("meta"):
        model = NaViTForImageClassification(config) if recipe.has_classifier else NaViTModel(config)
    model.to(example.dtype)
    root = "navit." if recipe.has_classifier else ""
    named = {name if name.startswith("classifier.") else f"{root}{name}": value for name, value in weights.items()}
    for name, empty in model.state_dict().items():
        if name in named and named[name].shape != empty.shape:
            raise ValueError(
                f"`source` must have tensors of the sizes that its configuration says: {name!r} must be "
                f"{tuple(empty.shape)}, got {tuple(named[name].shape)}."
            )
    unplaced = model.load_state_dict(named, strict=False, assign=True).unexpected_keys
    assert not unplaced, unplaced
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=example.device, recurse=False)
            model._init_weights(module)
    return model


def _report(recipe: Recipe, tensors: dict[str, Tensor], model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Log what was left out and what is new."""
    new = [name for name, _ in model.named_parameters() if name.removeprefix("navit.") not in weights]
    for what, names in (
        ("Left out of the source, since NaViT has no such tensors", recipe.names_left_out(tensors)),
        ("Left out of the source, since NaViT has no such options in training", recipe.dropped),
        ("New in NaViT, and to be trained", new),
    ):
        if names:
            logger.warning("%s: %s.", what, ", ".join(names))
