"""One call for every kind of vision tower: pixels in, patches of all images in one sequence out.

Shapes: n images, L patches of all images, D width of the tower, P side of a patch, m side of a merged block.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from .packed_index import merge_order


def tower_kind(tower: PreTrainedModel) -> str:
    """How a tower takes images.

    Returns:
        "packed" if it takes `image_grid_thw` (our parts), "naflex" if it takes `spatial_shapes` (Siglip2: padded rows
        of patches), "square" if it takes `pixel_values` `(n, C, H, W)` of one size (CLIP, SigLIP, ViT).

    Raises:
        ValueError: If it takes none of these.
    """
    names = inspect.signature(tower.forward).parameters
    if "image_grid_thw" in names:
        return "packed"
    if "spatial_shapes" in names:
        return "naflex"
    if "pixel_values" in names:
        return "square"
    raise ValueError(
        f"`vision` {type(tower).__name__} takes {', '.join(names)}; expected a forward with `pixel_values`, and "
        "`image_grid_thw` or `spatial_shapes` where images differ in size."
    )


def count_taps(vision_config: PreTrainedConfig, layer: int) -> int:
    """Number of layers that a tower hands to the projector.

    Args:
        vision_config: Configuration of the tower; its `feature_layers`, if any, name them.
        layer: -1 for what the tower gives, otherwise the one hidden state that is taken.
    """
    return len(getattr(vision_config, "feature_layers", (-1,))) if layer == -1 else 1


def grids_of_images(
    tower: PreTrainedModel,
    pixel_values: Tensor | None,
    image_grid_thw: Tensor | None,
    spatial_shapes: Tensor | None,
) -> Tensor | None:
    """Frames, rows and columns `(n, 3)` of images in patches, for any kind of tower; None if nothing tells them."""
    if image_grid_thw is not None:
        return image_grid_thw
    if spatial_shapes is not None:
        return torch.nn.functional.pad(spatial_shapes, (1, 0), value=1)
    if pixel_values is None or pixel_values.ndim != 4:
        return None
    sides = [side // tower.config.patch_size for side in pixel_values.shape[-2:]]
    return torch.tensor([[1, *sides]]).expand(len(pixel_values), -1)


def encode_images(
    tower: PreTrainedModel,
    pixel_values: Tensor,
    image_grid_thw: Tensor | None,
    pixel_attention_mask: Tensor | None,
    spatial_shapes: Tensor | None,
    *,
    layer: int,
    merge_size: int,
    **precomputed: Any,
) -> tuple[BaseModelOutputWithPooling, tuple[Tensor, ...], Tensor]:
    """Run a tower and bring its patches into one sequence.

    Args:
        tower: The vision model.
        pixel_values: Packed `(L, C*P*P)`, padded `(n, patches, C*P*P)` or square `(n, C, H, W)`. Normalised pixels in
            any floating-point type; or raw ones (uint8), for towers that normalise them.
        image_grid_thw: `(n, 3)` for packed towers.
        pixel_attention_mask: `(n, patches)` for padded towers.
        spatial_shapes: `(n, 2)` rows and columns for padded towers.
        layer: Which hidden state: -1 the tower's output (of a packed tower with `feature_maps`, all of those),
            otherwise an index into its hidden states.
        merge_size: Side m of the blocks that a projector will merge.
        **precomputed: Further inputs of packed towers (`cu_seqlens`, `max_seqlen`, `position_ids`).

    Returns:
        The tower's output; `(L, D)` patches of all images in merge order, for each layer; `(n,)` patches of each
        image.

    Raises:
        ValueError: If an input that the tower needs is missing, or if it takes no raw pixels.
    """
    kind = tower_kind(tower)
    pixel_values = _typed(pixel_values, tower)
    wants_layers = {"output_hidden_states": True} if layer != -1 else {}
    if kind == "packed":
        require_inputs(image_grid_thw=image_grid_thw)
        outputs = tower(pixel_values, image_grid_thw, **wants_layers, **precomputed)
        maps = getattr(outputs, "feature_maps", None) if layer == -1 else None
        return outputs, tuple(maps or (_select(outputs, layer),)), image_grid_thw.prod(-1)
    if kind == "naflex":
        require_inputs(pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes)
        outputs = tower(pixel_values, pixel_attention_mask, spatial_shapes, **wants_layers)
        rows = _select(outputs, layer)
        features = [
            _reorder(row, height, width, merge_size)
            for row, (height, width) in zip(rows, spatial_shapes.tolist(), strict=True)
        ]
        return outputs, (torch.cat(features),), spatial_shapes.prod(-1)
    outputs = tower(pixel_values, **wants_layers)
    rows = _select(outputs, layer)
    height, width = (side // tower.config.patch_size for side in pixel_values.shape[-2:])
    # Class and register tokens stand before the patches.
    patches = rows[:, rows.shape[1] - height * width :]
    features = [_reorder(row, height, width, merge_size) for row in patches]
    return outputs, (torch.cat(features),), torch.full((len(rows),), height * width, device=rows.device)


def _typed(pixel_values: Tensor, tower: PreTrainedModel) -> Tensor:
    if pixel_values.is_floating_point():
        return pixel_values.to(tower.dtype)
    # A cast would pass raw pixels off as normalised ones.
    if not hasattr(tower.config, "image_mean"):
        raise ValueError(
            f"`pixel_values` is {pixel_values.dtype}; the vision tower {type(tower).__name__} takes normalised pixels "
            "in floating point."
        )
    return pixel_values


def _select(outputs: BaseModelOutputWithPooling, layer: int) -> Tensor:
    if layer == -1:
        return outputs.last_hidden_state
    # Our packed towers say where patches are among prefix tokens; other towers have those in front of each row.
    places = getattr(outputs, "patch_index", None)
    return outputs.hidden_states[layer] if places is None else outputs.hidden_states[layer][places]


def _reorder(row: Tensor, height: int, width: int, merge_size: int) -> Tensor:
    if merge_size == 1:
        return row[: height * width]
    if height % merge_size or width % merge_size:
        raise ValueError(
            f"A grid of {height} x {width} patches cannot be merged in blocks of {merge_size} x {merge_size}; "
            "choose another image size or `spatial_merge_size`."
        )
    return row[merge_order(height, width, merge_size).to(row.device)]


def require_inputs(**inputs: Tensor | None) -> None:
    """Check that inputs which a vision tower needs are there.

    Raises:
        ValueError: If one is None; names it.
    """
    for name, value in inputs.items():
        if value is None:
            raise ValueError(f"`{name}` must be given with `pixel_values` for this vision tower, got None.")
