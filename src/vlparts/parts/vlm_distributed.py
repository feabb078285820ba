"""A forward pass without images beside processes that have some.

Shapes: n images, m side of a merged block, C channels, P side of a patch.
"""

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers.modeling_utils import PreTrainedModel

from .vlm_features import get_vision_tower
from .vlm_towers import patch_width

_SIDE = 4  # patches; all encoders that divide their grids divide them by 2 or 4
_SHARDED = ("device_mesh", "ds_id")  # of a DTensor (FSDP2), of a parameter of DeepSpeed


def must_run(*modules: nn.Module) -> bool:
    """Whether modules must take part in a forward pass that has no inputs for them, because other processes wait.

    With several processes, gradients of trained parameters are averaged, and sharded parameters are gathered, by all
    processes together.

    Args:
        *modules: The modules.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    parameters = [*chain.from_iterable(module.parameters() for module in modules)]
    if torch.is_grad_enabled() and any(one.requires_grad for one in parameters):
        return True
    return any(hasattr(one, name) for one in parameters for name in _SHARDED)


def blank_image(encoder: PreTrainedModel, merge_size: int, device: torch.device) -> dict[str, Tensor]:
    """Return the inputs of a small image of zeros, for any vision encoder.

    Args:
        encoder: The vision encoder.
        merge_size: m.
        device: Device of the inputs.

    Returns:
        `pixel_values` and the inputs that the encoder needs with it; see [`MultimodalInputsMixin.get_image_features`].

    Raises:
        ValueError: If the encoder takes images of one size, and its configuration has no `image_size`.
    """
    config, layout, side = encoder.config, get_vision_tower(encoder).layout, math.lcm(merge_size, _SIDE)
    sides = torch.tensor([[side, side]], device=device)
    if layout == "packed":
        pixels = torch.zeros(side**2, patch_width(config), device=device)
        return {"pixel_values": pixels, "image_grid_thw": nn.functional.pad(sides, (1, 0), value=1)}
    if layout == "naflex":
        pixels = torch.zeros(1, side**2, patch_width(config), device=device)
        mask = torch.ones(pixels.shape[:2], dtype=torch.int64, device=device)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": sides}
    channels = getattr(config, "num_channels", 3)
    if layout == "padded":
        size: Any = side * config.patch_size
        pixels = torch.zeros(1, channels, size, size, device=device)
        return {"pixel_values": pixels, "spatial_shapes": sides}
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError(
            f"`vision_config` of {type(encoder).__name__} must have an `image_size`, so that a process without images "
            "can run it beside processes with images."
        )
    return {
        "pixel_values": torch.zeros(1, channels, *((size, size) if isinstance(size, int) else size), device=device)
    }


def attach_unseen(inputs_embeds: Tensor, features: Tensor) -> Tensor:
    """Return embeddings `(B, S, E)` unchanged, with features `(tokens, E)` whose gradients are zero."""
    nowhere = torch.zeros_like(inputs_embeds[..., :1], dtype=torch.bool)
    return inputs_embeds.masked_scatter(nowhere, features.to(inputs_embeds))
