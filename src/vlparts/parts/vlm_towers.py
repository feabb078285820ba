"""Table of the native vision encoders that composed models can hold: how each is built, called and read.

Shapes: n images, L patches of all images, D width of the features, m side of a merged block.
"""

import importlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

# Takes the encoder, `pixel_values`, the grids `(n, 3)` or `(n, 2)` of images of several sizes, m, and options.
CallEncoder = Callable[[PreTrainedModel, Tensor, Tensor, int, dict[str, Any]], Any]


@dataclass(frozen=True)
class VisionTower:
    """How a native vision encoder is built, called and read.

    Args:
        layout: How images are given; see [`pixel_layout`].
        features: Takes the outputs and returns the features: `(n, prefix + patches, D)` or a map `(n, D, rows,
            columns)` for images of one size, `(L, D)` or `(1, L, D)` for others. None for `last_hidden_state`.
        width: D, from the configuration.
        prefix: Number of class and register tokens before the patches.
        stride: Side in pixels of the square that each feature covers, for images of one size. In a hierarchical
            encoder it is the product of the strides of its stages.
        has_layers: Whether `hidden_states` hold features of the same shape.
        merges: Whether the encoder merges blocks of m x m patches itself.
        merge_size: m, from the configuration; None for any.
        merge_order: Whether the patches of packed images are in merge order, not in raster order.
        call: Runs an encoder of packed or padded images.
        model: Name of the model class, for configurations that `AutoModel` does not know or wraps.
        without: Fields of the configuration that leave out modules which a composed model does not use.
        arguments: Arguments of the model class that do so.
        left_out: Names of these modules and parameters.
    """

    layout: str = "square"
    features: Callable[[Any], Tensor] | None = None
    width: Callable[[Any], int] = lambda config: config.hidden_size
    prefix: Callable[[Any], int] = lambda config: 0
    stride: Callable[[Any], int | list[int] | tuple[int, ...]] = lambda config: config.patch_size
    has_layers: bool = True
    merges: bool = False
    merge_size: Callable[[Any], int | None] = lambda config: getattr(config, "spatial_merge_size", None)
    merge_order: bool = True
    call: CallEncoder | None = None
    model: str | None = None
    without: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def _packed(encoder: PreTrainedModel, pixels: Tensor, grids: Tensor, merge_size: int, options: dict[str, Any]) -> Any:
    return encoder(pixels, grids, **options)


def _kimi(encoder: PreTrainedModel, pixels: Tensor, grids: Tensor, merge_size: int, options: dict[str, Any]) -> Any:
    side = encoder.config.patch_size
    return encoder(pixels.reshape(len(pixels), -1, side, side), grids, **options)


def _paddle(encoder: PreTrainedModel, pixels: Tensor, grids: Tensor, merge_size: int, options: dict[str, Any]) -> Any:
    side = encoder.config.patch_size
    return encoder(pixels.reshape(1, len(pixels), -1, side, side), grids, **options)


def _video_llama(
    encoder: PreTrainedModel, pixels: Tensor, grids: Tensor, merge_size: int, options: dict[str, Any]
) -> Any:
    return encoder(pixels, grids, torch.full_like(grids[:, 0], merge_size), **options)


def _padded(encoder: PreTrainedModel, pixels: Tensor, grids: Tensor, merge_size: int, options: dict[str, Any]) -> Any:
    return encoder(pixels, grids * encoder.config.patch_size, **options)


def _gemma(encoder: PreTrainedModel, pixels: Tensor, grids: Tensor, merge_size: int, options: dict[str, Any]) -> Any:
    # Column and row of each patch, -1 for padding.
    index = torch.arange(pixels.shape[1], device=pixels.device).expand(pixels.shape[:2])
    positions = torch.stack((index % grids[:, 1:], index // grids[:, 1:]), -1)
    positions = positions.masked_fill((index >= grids.prod(-1, keepdim=True)).unsqueeze(-1), -1)
    return encoder(pixels, positions, **options)


def _one(config: Any) -> int:
    return 1


def _with_registers(config: Any) -> int:
    return 1 + config.num_register_tokens


_HEAD: dict[str, Any] = {"without": {"vision_use_head": False}, "left_out": ("head",)}
_POOLER: dict[str, Any] = {"arguments": {"add_pooling_layer": False}, "left_out": ("pooler",)}
_CLIP = VisionTower(prefix=_one)
_MERGER: dict[str, Any] = {
    "layout": "packed",
    "features": lambda outputs: outputs.pooler_output,
    "width": lambda config: config.out_hidden_size,
    "has_layers": False,
    "merges": True,
    "call": _packed,
}
_DEEPSTACK = VisionTower(**_MERGER, without={"deepstack_visual_indexes": []}, left_out=("deepstack_merger_list",))

VISION_TOWERS: dict[str, VisionTower] = {
    # Images of one size; class and register tokens precede the patches.
    "aimv2_vision_model": VisionTower(without={"use_head": False}, left_out=("head",)),
    "altclip_vision_model": VisionTower(prefix=_one, model="AltCLIPVisionModel"),
    "beit": VisionTower(prefix=_one, **_POOLER),
    "blip_vision_model": VisionTower(prefix=_one, model="BlipVisionModel"),
    "blip_2_vision_model": VisionTower(prefix=_one, model="Blip2VisionModel"),
    "chinese_clip_vision_model": _CLIP,
    "clip_vision_model": _CLIP,
    "data2vec-vision": VisionTower(prefix=_one, **_POOLER),
    "deit": VisionTower(prefix=lambda config: 2, **_POOLER),
    "dinov2": VisionTower(prefix=_one, without={"use_mask_token": False}, left_out=("embeddings.mask_token",)),
    "dinov2_with_registers": VisionTower(prefix=_with_registers),
    "dinov3_vit": VisionTower(prefix=_with_registers),
    "idefics3_vision": VisionTower(),
    "ijepa": VisionTower(**_POOLER),
    "instructblip_vision_model": VisionTower(prefix=_one, model="InstructBlipVisionModel"),
    "internvl_vision": _CLIP,
    "janus_vision_model": VisionTower(model="JanusVisionModel"),
    "metaclip_2_vision_model": VisionTower(prefix=_one, model="MetaClip2VisionModel"),
    "mlcd_vision_model": _CLIP,
    "siglip_vision_model": VisionTower(**_HEAD),
    "smolvlm_vision": VisionTower(),
    "vit": VisionTower(prefix=_one, **_POOLER),
    "vit_msn": _CLIP,
    "dpt": VisionTower(prefix=_one, **_POOLER),
    "granite_docling_vision": VisionTower(),
    "pixio": VisionTower(prefix=lambda config: config.n_cls_tokens),
    "qianfan_ocr_vision": _CLIP,
    "radio": VisionTower(prefix=lambda config: config.num_cls_tokens + config.num_registers),
    "sam3_vit_model": VisionTower(has_layers=False),
    "sapiens2": VisionTower(prefix=_with_registers),
    "tipsv2_vision_model": VisionTower(prefix=_with_registers),
    # Images of one size; the output is a map, or comes from a hierarchy of stages.
    "convnextv2": VisionTower(
        width=lambda config: config.hidden_sizes[-1],
        stride=lambda config: config.patch_size * 2 ** (len(config.hidden_sizes) - 1),
        has_layers=False,
    ),
    "llama4_vision_model": VisionTower(
        width=lambda config: config.projector_output_dim,
        stride=lambda config: round(config.patch_size / config.pixel_shuffle_ratio),
        model="Llama4VisionModel",
        has_layers=False,
    ),
    "sam_vision_model": VisionTower(
        width=lambda config: config.output_channels, model="SamVisionEncoder", has_layers=False
    ),
    "sam2_hiera_det_model": VisionTower(
        features=lambda outputs: outputs.last_hidden_state.permute(0, 3, 1, 2),
        width=lambda config: config.embed_dim_per_stage[-1],
        stride=lambda config: config.patch_stride[0] * config.query_stride[0] ** config.num_query_pool_stages,
        has_layers=False,
    ),
    "sam_hq_vision_model": VisionTower(
        width=lambda config: config.output_channels, model="SamHQVisionEncoder", has_layers=False
    ),
    "swin": VisionTower(
        stride=lambda config: config.patch_size * 2 ** (len(config.depths) - 1), has_layers=False, **_POOLER
    ),
    # Images of several sizes.
    "siglip2_vision_model": VisionTower(layout="naflex", **_HEAD),
    "gemma4_vision": VisionTower(
        layout="naflex",
        has_layers=False,
        merges=True,
        merge_size=lambda config: config.pooling_kernel_size,
        call=_gemma,
    ),
    "pixtral": VisionTower(layout="padded", merge_order=False, call=_padded),
    "kimi_k25_vision": VisionTower(layout="packed", merge_order=False, call=_kimi),
    "paddleocr_vl_vision": VisionTower(layout="packed", merge_order=False, call=_paddle, model="PaddleOCRVisionModel"),
    # Images of several sizes; the encoder merges blocks of patches.
    "glm4v_vision": VisionTower(**_MERGER),
    "exaone4_5_vision": VisionTower(**_MERGER),
    "glm4v_moe_vision": VisionTower(**_MERGER),
    "glm_ocr_vision": VisionTower(**_MERGER),
    "qwen2_vl_vision": VisionTower(
        **{**_MERGER, "width": lambda config: config.hidden_size}, model="Qwen2VisionTransformerPretrainedModel"
    ),
    "qwen2_5_vl_vision": VisionTower(**_MERGER),
    "qwen3_5_moe_vision": VisionTower(**_MERGER),
    "qwen3_5_vision": VisionTower(**_MERGER),
    "qwen3_vl_vision": _DEEPSTACK,
    "qwen3_vl_moe_vision": _DEEPSTACK,
    "video_llama_3_vision": VisionTower(layout="packed", has_layers=False, merges=True, call=_video_llama),
}


def vision_width(config: PreTrainedConfig, layer: int = -1) -> int:
    """Return D, the width of the features of a vision encoder.

    Args:
        config: Configuration of the vision encoder.
        layer: -1 for its output, otherwise an index into its hidden states.

    Raises:
        ValueError: If the encoder's hidden states cannot be taken.
    """
    tower = VISION_TOWERS.get(config.model_type)
    if tower is None:
        return config.hidden_size
    if layer != -1 and not tower.has_layers:
        raise ValueError(
            f"`vision_feature_layer` must be -1 for a vision encoder of type {config.model_type!r}, whose hidden "
            f"states have another shape than its output, got {layer}."
        )
    return tower.width(config)


def vision_merge_size(config: PreTrainedConfig) -> int | None:
    """Return m, the side of the blocks of patches that become one token, or None if the encoder does not say."""
    tower = VISION_TOWERS.get(config.model_type)
    return getattr(config, "spatial_merge_size", None) if tower is None else tower.merge_size(config)


def patch_width(config: Any) -> int:
    """Return the number of values in a row of `pixel_values` of a native encoder of packed images."""
    channels: int = getattr(config, "in_channels", getattr(config, "num_channels", 3))
    return channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2


def merges_patches(config: PreTrainedConfig) -> bool:
    """Return whether a vision encoder merges blocks of patches itself, so that the projector does not."""
    tower = VISION_TOWERS.get(config.model_type)
    return tower is not None and tower.merges


def leave_out_unused(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration without modules that a composed model does not use (pooling heads); a copy if changed."""
    tower = VISION_TOWERS.get(config.model_type)
    changes = {} if tower is None else {k: v for k, v in tower.without.items() if getattr(config, k, v) != v}
    if not changes:
        return config
    changed = deepcopy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


# Keys of modules that are left out, in folders of earlier versions or of models that were given with them.
LEFT_OUT_KEYS = tuple(
    sorted({rf"vision_tower\.{name}(\.|$)" for tower in VISION_TOWERS.values() for name in tower.left_out})
)


def native_model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the model class of a native vision encoder that `AutoModel` does not build, or None."""
    tower = VISION_TOWERS.get(config.model_type)
    if tower is None or tower.model is None:
        return None
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    return getattr(importlib.import_module(module), tower.model)


def native_encoder_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a native vision encoder with new weights, without modules that a composed model does not use."""
    build, arguments = native_model_class(config), VISION_TOWERS[config.model_type].arguments
    return AutoModel.from_config(config, **arguments) if build is None else build._from_config(config, **arguments)
