"""Build a NaViT with the weights of another vision transformer."""

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers.configuration_utils import PreTrainedConfig

from ...parts.configuration_navit import NaViTConfig
from ...parts.modeling_navit import NaViTForImageClassification, NaViTModel
from ...parts.pos_embed_tables import resample_axis
from ...parts.utils import mark_initialized
from .._folder import read_json
from . import siglip2, vit
from .naflexvit import is_naflexvit, read_naflexvit
from .rules import Conversion

logger = logging.getLogger(__name__)

_POOLINGS = get_args(NaViTConfig.__annotations__["pooling"])
_LABEL_FIELDS = {"id2label", "label2id", "problem_type"}
# Fields of the source that the caller may change: the weights do not fix them.
_CHANGEABLE = {"position_coordinates", "position_interpolation", *_LABEL_FIELDS}
_TABLES = "embeddings.position_embedding."

# Class of transformers that loads a folder, by the folder's architecture, or by its model type if it names none.
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
# Prefixes of the tensors that a folder may have besides those of the class.
_UNUSED = ("pooler.", "embeddings.mask_token", "text_model.", "logit_scale", "logit_bias")


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
    memory with it, and is in evaluation mode. Tensors and options of the source that are left out and parameters that
    are new are logged as a warning.

    Args:
        source: A `ViTModel` or `ViTForImageClassification`; a `Siglip2VisionModel`, a `Siglip2Model` (its vision tower
            is used) or `Siglip2ForImageClassification`; a timm `NaFlexVit`; or the folder of a checkpoint of one of
            the transformers models, with safetensors.
        max_grid_size: Rows N of the position tables. None keeps the source's, which must be square then. Tables of
            another size are resampled to N x N with `position_interpolation`: unless that is changed, an image of
            N x N patches gets the position embeddings that the source computes for it.
        pooling: As in [`NaViTConfig`]. None keeps the source's. With another one, a class token becomes a register, so
            that the patch outputs stay the same; a head "map" that the source does not have is new.
        **changes: Other fields of [`NaViTConfig`] that the weights do not fix, for example `spatial_merge_size` or
            `max_frames` (whose table is new).

    Returns:
        A `NaViTForImageClassification` if the source has a classifier, else a `NaViTModel`.

    Raises:
        ValueError: If the source is of another class, uses an option that NaViT does not have (the message names it),
            or has missing or unexpected tensors; if a field is unknown or fixed by the weights.
        OSError: If the folder has no safetensors.
    """
    if pooling is not None and pooling not in _POOLINGS:
        raise ValueError(f"`pooling` must be one of {', '.join(_POOLINGS)} or None, got {pooling!r}.")
    module = _load_folder(source) if isinstance(source, (str, os.PathLike)) else source
    conversion = _get_reader(module)(module, pooling)
    config = _get_config(conversion, max_grid_size, changes)
    tensors = module.state_dict()
    weights = conversion.apply(tensors)
    for name in [name for name in weights if name.startswith(_TABLES)]:
        weights[name] = _resample(weights[name], config.max_grid_size, config.position_interpolation)
    model = _build(conversion, config, weights)
    _report(conversion, tensors, model, weights)
    return model.eval()


def _get_reader(source: object) -> Callable[[Any, str | None], Conversion]:
    if isinstance(source, vit.SOURCES):
        return vit.read_vit
    if isinstance(source, siglip2.SOURCES):
        return siglip2.read_siglip2
    if is_naflexvit(source):
        return read_naflexvit
    names = ", ".join(source_class.__name__ for source_class in (*vit.SOURCES, *siglip2.SOURCES))
    raise ValueError(
        f"`source` must be a {names}, timm NaFlexVit or the folder of a checkpoint, "
        f"got {type(source).__module__}.{type(source).__name__}."
    )


def _get_config(conversion: Conversion, max_grid_size: int | None, changes: dict[str, Any]) -> NaViTConfig:
    fixed = conversion.fields.keys() - _CHANGEABLE
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    known = {field.name for field in dataclasses.fields(NaViTConfig)} - inherited | _LABEL_FIELDS
    for name, value in changes.items():
        if name in fixed:
            raise ValueError(
                f"`{name}` is {conversion.fields[name]!r} in `source` and must not be changed, got {value!r}."
            )
        if name not in known:
            raise ValueError(f"`changes` must be fields of NaViTConfig, got {name!r}.")
    return NaViTConfig(**{**conversion.fields, **_get_grid_size(conversion, max_grid_size), **changes})


def _get_grid_size(conversion: Conversion, max_grid_size: int | None) -> dict[str, int]:
    """The field `max_grid_size`, if there are tables."""
    if conversion.grid is None:
        if max_grid_size is not None:
            raise ValueError(f"`max_grid_size` must be None for a `source` without tables, got {max_grid_size}.")
        return {}
    rows, columns = conversion.grid
    if max_grid_size is None and rows != columns:
        raise ValueError(
            f"`max_grid_size` must be given to resample the tables of `source`, which are not square: its "
            f"`{conversion.grid_option}` makes {rows} x {columns} patches."
        )
    return {"max_grid_size": rows if max_grid_size is None else max_grid_size}


def _build(
    conversion: Conversion, config: NaViTConfig, weights: dict[str, Tensor]
) -> NaViTModel | NaViTForImageClassification:
    """A model with the weights; parameters that are not among them are initialized."""
    example = weights["norm.weight"]
    with torch.device("meta"):
        model = NaViTForImageClassification(config) if conversion.has_classifier else NaViTModel(config)
    model.to(example.dtype)
    root = "navit." if conversion.has_classifier else ""
    named = {name if name.startswith("classifier.") else f"{root}{name}": value for name, value in weights.items()}
    for name, empty in model.state_dict().items():
        if name in named and named[name].shape != empty.shape:
            raise ValueError(
                f"`source` must have tensors of the shapes that its configuration describes: {name!r} must be "
                f"{tuple(empty.shape)}, got {tuple(named[name].shape)}."
            )
    unexpected = model.load_state_dict(named, strict=False, assign=True).unexpected_keys
    assert not unexpected, unexpected
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=example.device, recurse=False)
            model._init_weights(module)
    mark_initialized(model)
    return model


def _report(conversion: Conversion, tensors: dict[str, Tensor], model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Log what is left out and what is new."""
    new = [name for name, _ in model.named_parameters() if name.removeprefix("navit.") not in weights]
    for what, names in (
        ("Left out of the source, since NaViT has no such tensors", conversion.names_left_out(tensors)),
        ("Left out of the source, since NaViT has no such training options", conversion.dropped),
        ("New in NaViT, and to be trained", new),
    ):
        if names:
            logger.warning("%s: %s.", what, ", ".join(names))


def _resample(table: Tensor, size: int, interpolation: str) -> Tensor:
    """Resample a position table, in float32 or better.

    Args:
        table: `(rows, columns, D)` for joint positions, or `(rows, D)` for those of one axis.
        size: Rows and columns N of the result.
        interpolation: "bilinear" or "bicubic", with the suffix "_antialias" where it filters.

    Returns:
        `(N, N, D)` or `(N, D)`; the table itself if it has this size.
    """
    sizes = [size] * (table.ndim - 1)
    if list(table.shape[:-1]) == sizes:
        return table
    precise = table.to(torch.promote_types(table.dtype, torch.float32))
    if table.ndim == 2:  # not as an image of one column, for which PyTorch's antialiased interpolation is wrong on CPU
        index = torch.arange(size, device=table.device)
        return resample_axis(precise, index, torch.full_like(index, size), interpolation).to(table.dtype)
    mode, _, antialias = interpolation.partition("_")
    resized = interpolate(precise.movedim(-1, 0)[None], size=sizes, mode=mode, antialias=bool(antialias))
    return resized[0].movedim(0, -1).to(table.dtype).contiguous()


def _load_folder(folder: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint of transformers from a local folder, in its own dtype."""
    name = _CLASSES[_get_architecture(Path(folder))]
    options: dict[str, Any] = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, info = getattr(transformers, name).from_pretrained(
        os.fspath(folder),
        dtype="auto",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(_UNUSED))
    if missing or unexpected:
        raise ValueError(
            f"`source` must have the tensors of {name} and no others, got {os.fspath(folder)!r}. "
            f"Missing: {', '.join(missing) or 'none'}. Unexpected: {', '.join(unexpected) or 'none'}."
        )
    return model


def _get_architecture(folder: Path) -> str:
    """The key of `_CLASSES` for a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"`source` must be a module or a local folder with a config.json, got {str(folder)!r}.")
    config = read_json(path, "source")
    if "architecture" in config and "model_type" not in config:
        raise ValueError(
            "`source` must be a module for a timm checkpoint, got a folder: only timm knows the options of "
            f"{config['architecture']!r}. Build it with timm.create_model, and pass the module."
        )
    named = config.get("architectures") or []
    name = [*named, config.get("model_type")][0] if isinstance(named, list) else named
    if not isinstance(name, str) or name not in _CLASSES:
        raise ValueError(f"`source` must have one of {', '.join(_CLASSES)}, got {name!r}.")
    return name
