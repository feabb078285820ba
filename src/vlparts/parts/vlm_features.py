"""Patch features of any vision encoder: pixels in, the patches of all images in one sequence out.

Shapes: n images, L patches of all images, D width of the encoder, P side of a patch, m side of a merged block.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from .packed_index import merge_order
from .utils import activation_dtype, check_shape


def pixel_layout(encoder: PreTrainedModel) -> str:
    """Return how a vision encoder takes images.

    Returns:
        "packed" if it takes `image_grid_thw` (our parts), "naflex" if it takes `spatial_shapes` (Siglip2: padded rows
        of patches), "square" if it takes `pixel_values` `(n, C, H, W)` of one size (CLIP, SigLIP, ViT).

    Raises:
        ValueError: If its `forward` has none of these arguments.
    """
    names = inspect.signature(encoder.forward).parameters
    if "image_grid_thw" in names:
        return "packed"
    if "spatial_shapes" in names:
        return "naflex"
    if "pixel_values" in names:
        return "square"
    raise ValueError(
        f"`vision` {type(encoder).__name__} takes {', '.join(names)}; expected a forward with `pixel_values`, and "
        "`image_grid_thw` or `spatial_shapes` if images differ in size."
    )


def get_encoder_options(encoder: PreTrainedModel, given: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return keyword arguments for a vision encoder: its outputs, and the inputs of packed encoders by their names.

    Args:
        encoder: The vision encoder.
        given: `output_hidden_states`, `output_attentions`, and precomputed inputs with the prefix.
        kind: The prefix, "image" or "video".

    Raises:
        ValueError: If the encoder does not take one of them; names it.
    """
    if not given:
        return {}
    names = {name: name for name in ("output_hidden_states", "output_attentions")}
    if pixel_layout(encoder) == "packed":
        inputs = inspect.signature(encoder.forward).parameters.values()
        precomputed = [one.name for one in inputs if one.kind is one.POSITIONAL_OR_KEYWORD]
        names |= {f"{kind}_{name}": name for name in precomputed if name not in ("pixel_values", "image_grid_thw")}
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(
            f"`kwargs` of the {kind} features must be among {', '.join(names)} for the vision encoder "
            f"{type(encoder).__name__}, got {', '.join(unknown)}."
        )
    return {names[name]: value for name, value in given.items()}


def get_image_grids(
    encoder: PreTrainedModel,
    pixel_values: Tensor | None,
    image_grid_thw: Tensor | None,
    spatial_shapes: Tensor | None,
) -> Tensor | None:
    """Return frames, rows and columns `(n, 3)` of images in patches, from the inputs of any vision encoder.

    None if the inputs do not determine them.
    """
    if image_grid_thw is not None:
        return image_grid_thw
    if spatial_shapes is not None:
        return torch.nn.functional.pad(spatial_shapes, (1, 0), value=1)
    if pixel_values is None or pixel_values.ndim != 4:
        return None
    sides = [side // encoder.config.patch_size for side in pixel_values.shape[-2:]]
    return torch.tensor([[1, *sides]]).expand(len(pixel_values), -1)


def encode_images(
    encoder: PreTrainedModel,
    pixel_values: Tensor,
    image_grid_thw: Tensor | None,
    pixel_attention_mask: Tensor | None,
    spatial_shapes: Tensor | None,
    *,
    layer: int,
    merge_size: int,
    **options: Any,
) -> tuple[BaseModelOutputWithPooling, tuple[Tensor, ...], Tensor]:
    """Run a vision encoder and return the patches of all images as one sequence.

    Args:
        encoder: The vision encoder.
        pixel_values: Packed `(L, C*P*P)`, padded `(n, patches, C*P*P)` or square `(n, C, H, W)`. Normalised pixels in
            any floating-point type, or raw pixels (uint8) for encoders that normalise them.
        image_grid_thw: `(n, 3)` for packed encoders.
        pixel_attention_mask: `(n, patches)` for padded encoders.
        spatial_shapes: `(n, 2)` rows and columns for padded encoders.
        layer: -1 for the encoder's output (of a packed encoder with `feature_maps`, all of them), otherwise an index
            into its hidden states.
        merge_size: Side m of the blocks that a projector merges.
        **options: Passed to the encoder: `output_hidden_states`, `output_attentions`, and further inputs of packed
            encoders (`cu_seqlens`, `max_seqlen`, `position_ids`).

    Returns:
        The encoder's output; one `(L, D)` per feature layer, with the patches of all images in merge order; `(n,)`
        number of patches per image.

    Raises:
        ValueError: If an input that the encoder needs is missing or has another shape, or raw pixels are given to an
            encoder that does not normalise them.
    """
    layout = pixel_layout(encoder)
    pixel_values = _cast_pixels(pixel_values, encoder)
    if layer != -1:
        options["output_hidden_states"] = True
    if layout == "packed":
        require_inputs(image_grid_thw=image_grid_thw)
        outputs = encoder(pixel_values, image_grid_thw, **options)
        maps = getattr(outputs, "feature_maps", None) if layer == -1 else None
        return outputs, tuple(maps or (_select_layer(outputs, layer),)), image_grid_thw.prod(-1)
    if layout == "naflex":
        require_inputs(pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes)
        assert pixel_attention_mask is not None
        assert spatial_shapes is not None
        if not torch.compiler.is_compiling():
            check_shape("pixel_values", pixel_values, None, None, None)
            check_shape("pixel_attention_mask", pixel_attention_mask, *pixel_values.shape[:2])
            check_shape("spatial_shapes", spatial_shapes, len(pixel_values), 2)
        outputs = encoder(pixel_values, pixel_attention_mask, spatial_shapes, **options)
        rows = _select_layer(outputs, layer)
        features = [
            _merge_order(row, height, width, merge_size)
            for row, (height, width) in zip(rows, spatial_shapes.tolist(), strict=True)
        ]
        return outputs, (torch.cat(features),), spatial_shapes.prod(-1)
    check_shape("pixel_values", pixel_values, None, None, None, None)
    outputs = encoder(pixel_values, **options)
    rows = _select_layer(outputs, layer)
    height, width = (side // encoder.config.patch_size for side in pixel_values.shape[-2:])
    # Class and register tokens precede the patches.
    patches = rows[:, rows.shape[1] - height * width :]
    features = [_merge_order(row, height, width, merge_size) for row in patches]
    return outputs, (torch.cat(features),), torch.full((len(rows),), height * width, device=rows.device)


def _cast_pixels(pixel_values: Tensor, encoder: PreTrainedModel) -> Tensor:
    if pixel_values.is_floating_point():
        return pixel_values.to(activation_dtype(encoder, pixel_values.dtype))
    # A cast would turn raw pixels into wrong normalised ones without an error.
    if not hasattr(encoder.config, "image_mean"):
        raise ValueError(
            f"`pixel_values` is {pixel_values.dtype}; the vision encoder {type(encoder).__name__} takes normalised "
            "pixels in floating point."
        )
    return pixel_values


def _select_layer(outputs: BaseModelOutputWithPooling, layer: int) -> Tensor:
    if layer == -1:
        return outputs.last_hidden_state
    # Our packed encoders return the indices of patches among prefix tokens.
    patch_index = getattr(outputs, "patch_index", None)
    return outputs.hidden_states[layer] if patch_index is None else outputs.hidden_states[layer][patch_index]


def _merge_order(row: Tensor, height: int, width: int, merge_size: int) -> Tensor:
    """Reorder the patches of one image from raster to merge order, and drop padding."""
    if merge_size == 1:
        return row[: height * width]
    if height % merge_size or width % merge_size:
        raise ValueError(
            f"A grid of {height} x {width} patches cannot be merged in blocks of {merge_size} x {merge_size}; "
            "choose another image size or `spatial_merge_size`."
        )
    return row[merge_order(height, width, merge_size).to(row.device)]


def require_inputs(**inputs: Tensor | None) -> None:
    """Check that inputs which a vision encoder needs are given.

    Raises:
        ValueError: If one is None; names it.
    """
    for name, value in inputs.items():
        if value is None:
            raise ValueError(f"`{name}` must be given with `pixel_values` for this vision encoder, got None.")
