"""Patch features of any vision encoder: pixels in, the patches of all images in one sequence out.

Shapes: n images, L patches of all images, D width of the encoder, P side of a patch, m side of a merged block.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from .image_pixels import check_normalized
from .packed_index import get_patch_layout, merge_order, validate_grid
from .utils import activation_dtype, check_shape
from .vlm_towers import VISION_TOWERS, VisionTower, patch_width

# Encoders that are not native, by the argument of `forward` that tells their layout.
_CONTRACTS = {
    "image_grid_thw": VisionTower(layout="packed"),
    "spatial_shapes": VisionTower(layout="naflex"),
    "pixel_values": VisionTower(prefix=lambda config: getattr(config, "num_prefix_tokens", 0)),
}


def get_vision_tower(encoder: PreTrainedModel) -> VisionTower:
    """Return how a vision encoder is called and read, by its model type or the arguments of its `forward`.

    Raises:
        ValueError: If it is native and not in the table, or its `forward` does not take images.
    """
    tower = VISION_TOWERS.get(encoder.config.model_type)
    if tower is not None:
        return tower
    names = inspect.signature(encoder.forward).parameters
    if not type(encoder).__module__.startswith("transformers."):
        for name, contract in _CONTRACTS.items():
            if name in names:
                return contract
    raise ValueError(
        f"`vision` {type(encoder).__name__} of type {encoder.config.model_type!r} takes {', '.join(names)}; "
        f"expected one of type {', '.join(sorted(VISION_TOWERS))}, a vision encoder of vlparts, or your own with a "
        "forward with `pixel_values`, and `image_grid_thw` or `spatial_shapes` if images differ in size."
    )


def pixel_layout(encoder: PreTrainedModel) -> str:
    """Return how a vision encoder takes images.

    Returns:
        "packed" if it takes patches of all images in one sequence and their grids (ours, Qwen2-VL), "padded" if it
        takes `pixel_values` `(n, C, H, W)` padded to the largest image (Pixtral), "naflex" if it takes padded rows
        of patches (Siglip2), "square" if it takes `pixel_values` `(n, C, H, W)` of one size (CLIP, SigLIP, ViT).

    Raises:
        ValueError: If it is native and not in the table, or its `forward` does not take images.
    """
    return get_vision_tower(encoder).layout


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
    inputs = inspect.signature(encoder.forward).parameters
    if "image_grid_thw" in inputs:
        precomputed = [one.name for one in inputs.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
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
    sides = get_square_grid(encoder, *pixel_values.shape[-2:])
    return torch.tensor([[1, *sides]]).expand(len(pixel_values), -1)


def get_square_grid(encoder: PreTrainedModel, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the features of images of `height` x `width` pixels, for encoders of one size."""
    stride = get_vision_tower(encoder).stride(encoder.config)
    rows, columns = (stride, stride) if isinstance(stride, int) else stride
    return height // rows, width // columns


def get_class_tokens(encoder: PreTrainedModel, outputs: Any, layer: int) -> Tensor:
    """Return the class token of each image or frame, `(n, D)`.

    Args:
        encoder: The vision encoder.
        outputs: Its output.
        layer: -1, or an index into its hidden states.

    Raises:
        ValueError: If the encoder has no class token.
    """
    tower = get_vision_tower(encoder)
    if tower.layout == "square" and tower.prefix(encoder.config):
        return (outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer])[:, 0]
    prefix = getattr(outputs, "prefix_hidden_state", None)
    if prefix is None or getattr(encoder.config, "pooling", None) != "class_token" or layer != -1:
        raise ValueError(
            f"`query` 'class_token' needs a class token, which the vision encoder {type(encoder).__name__} has not "
            f"(`vision_feature_layer`={layer}); expected the query 'mean'."
        )
    return prefix[:, 0]


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
        pixel_values: Packed `(L, C*P*P)` (times the frames of a patch), rows of patches `(n, patches, C*P*P)`, or
            images `(n, C, H, W)`, padded or of one size. Normalised pixels in any floating-point type, or raw pixels
            (uint8) for encoders that normalise them.
        image_grid_thw: `(n, 3)` for packed encoders.
        pixel_attention_mask: `(n, patches)` for encoders of padded rows of patches.
        spatial_shapes: `(n, 2)` rows and columns of patches, for encoders of padded rows or padded images.
        layer: -1 for the encoder's output (of a packed encoder with `feature_maps`, all of them), otherwise an index
            into its hidden states.
        merge_size: Side m of the blocks that the projector, or the encoder itself, merges.
        **options: Passed to the encoder: `output_hidden_states`, `output_attentions`, and further inputs of packed
            encoders (`cu_seqlens`, `max_seqlen`, `position_ids`).

    Returns:
        The encoder's output; one `(L, D)` per feature layer, with the patches of all images in merge order, or
        `(L / m^2, D)` of an encoder that merges patches; `(n,)` number of patches per image.

    Raises:
        ValueError: If an input that the encoder needs is missing or has another shape, raw pixels are given to an
            encoder that does not normalise them, pixels are beyond the range of normalised ones (not checked while
            compiling), or the output does not hold one feature per patch.
    """
    tower = get_vision_tower(encoder)
    pixel_values = _cast_pixels(pixel_values, encoder)
    if layer != -1:
        options["output_hidden_states"] = True
    if tower.layout == "packed":
        require_inputs(image_grid_thw=image_grid_thw)
        assert image_grid_thw is not None
        return _encode_packed(encoder, tower, pixel_values, image_grid_thw, layer, merge_size, options)
    if tower.layout == "square":
        check_shape("pixel_values", pixel_values, None, None, None, None)
        outputs = encoder(pixel_values, **options)
        height, width = get_square_grid(encoder, *pixel_values.shape[-2:])
        maps = [
            _square_patches(encoder, tower, states, height, width)
            for states in _feature_maps(outputs, layer) or (_select_layer(outputs, layer, tower),)
        ]
        # All images have one order, and their number, unlike len(), stays dynamic in an exported program.
        orders = (_merge_order(rows.transpose(0, 1), height, width, merge_size) for rows in maps)
        merged = tuple(rows.transpose(0, 1).flatten(0, 1) for rows in orders)
        counts = torch.full(pixel_values.shape[:1], height * width, device=pixel_values.device)
        return _as_pooling_output(outputs), merged, counts
    require_inputs(spatial_shapes=spatial_shapes)
    assert spatial_shapes is not None
    if not torch.compiler.is_compiling():
        check_shape("pixel_values", pixel_values, None, None, None, *((None,) if tower.layout == "padded" else ()))
        check_shape("spatial_shapes", spatial_shapes, len(pixel_values), 2)
    if tower.layout == "padded":
        _check_padding(pixel_values, spatial_shapes, encoder.config.patch_size)
    if tower.call is not None:
        outputs = tower.call(encoder, pixel_values, spatial_shapes, merge_size, options)
        tokens = _select_layer(outputs, layer, tower)
        if tower.merges:
            return _as_pooling_output(outputs), (tokens,), spatial_shapes.prod(-1)
        rows = tokens[0].split(spatial_shapes.prod(-1).tolist())
    else:
        require_inputs(pixel_attention_mask=pixel_attention_mask)
        assert pixel_attention_mask is not None
        if not torch.compiler.is_compiling():
            check_shape("pixel_attention_mask", pixel_attention_mask, *pixel_values.shape[:2])
        outputs = encoder(pixel_values, pixel_attention_mask, spatial_shapes, **options)
        rows = _select_layer(outputs, layer, tower)
    features = [
        _merge_order(row, height, width, merge_size)
        for row, (height, width) in zip(rows, spatial_shapes.tolist(), strict=True)
    ]
    return _as_pooling_output(outputs), (torch.cat(features),), spatial_shapes.prod(-1)


def _encode_packed(
    encoder: PreTrainedModel,
    tower: VisionTower,
    pixel_values: Tensor,
    image_grid_thw: Tensor,
    layer: int,
    merge_size: int,
    options: dict[str, Any],
) -> tuple[BaseModelOutputWithPooling, tuple[Tensor, ...], Tensor]:
    counts = image_grid_thw.prod(-1)
    if tower.call is None:  # an encoder of ours, or of the user
        keep_index = options.get("keep_index")
        if keep_index is not None:
            counts = get_patch_layout(image_grid_thw, len(keep_index), 1, keep_index).cu_images[:-1].diff().long()
        outputs = encoder(pixel_values, image_grid_thw, **options)
        return outputs, _feature_maps(outputs, layer) or (_select_layer(outputs, layer),), counts
    if not torch.compiler.is_compiling():
        check_shape("pixel_values", pixel_values.flatten(1), None, patch_width(encoder.config))
        validate_grid(image_grid_thw, len(pixel_values), merge_size)
    outputs = tower.call(encoder, pixel_values, image_grid_thw, merge_size, options)
    features = _select_layer(outputs, layer, tower).flatten(0, -2)
    if not tower.merge_order and merge_size > 1:
        frames = [(height, width) for count, height, width in image_grid_thw.tolist() for _ in range(count)]
        rows = features.split([height * width for height, width in frames])
        features = torch.cat([_merge_order(row, *frame, merge_size) for row, frame in zip(rows, frames, strict=True)])
    return _as_pooling_output(outputs), (features,), counts


def _check_padding(pixel_values: Tensor, spatial_shapes: Tensor, patch_size: int) -> None:
    if torch.compiler.is_compiling():
        return
    height, width = (side // patch_size for side in pixel_values.shape[-2:])
    for index, (rows, columns) in enumerate(spatial_shapes.tolist()):
        if rows > height or columns > width:
            raise ValueError(
                f"`spatial_shapes[{index}]` must hold at most the {height} rows and {width} columns of "
                f"`pixel_values`, got {[rows, columns]}."
            )


def _square_patches(encoder: PreTrainedModel, tower: VisionTower, features: Tensor, height: int, width: int) -> Tensor:
    """Return the patches `(n, height * width, D)` of images of one size."""
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    prefix = tower.prefix(encoder.config)
    if features.ndim != 3 or features.shape[1] != prefix + height * width:
        raise ValueError(
            f"The vision encoder {type(encoder).__name__} returned features of shape {tuple(features.shape)} for "
            f"images of {height} x {width} patches; expected (images, {prefix + height * width}, width): "
            f"{prefix} class and register tokens (`num_prefix_tokens` of its configuration), then the patches."
        )
    return features[:, prefix:]


def _as_pooling_output(outputs: Any) -> BaseModelOutputWithPooling:
    """Return outputs with the field `pooler_output`, without features that `generate` would repeat for beams."""
    if isinstance(outputs, BaseModelOutputWithPooling) and not hasattr(outputs, "deepstack_features"):
        return outputs
    fields = ("last_hidden_state", "hidden_states", "attentions")
    return BaseModelOutputWithPooling(**{name: getattr(outputs, name, None) for name in fields})


def _cast_pixels(pixel_values: Tensor, encoder: PreTrainedModel) -> Tensor:
    # A cast, or a collator, would turn raw pixels into wrong normalised ones without an error.
    if not pixel_values.is_floating_point() or not torch.compiler.is_compiling():
        check_normalized(pixel_values, raw=hasattr(encoder.config, "image_mean"))
    if not pixel_values.is_floating_point():
        return pixel_values
    return pixel_values.to(activation_dtype(encoder, pixel_values.dtype))


def _feature_maps(outputs: Any, layer: int) -> tuple[Tensor, ...]:
    """Several features per patch, for projectors that take them; none for a single layer."""
    return tuple(getattr(outputs, "feature_maps", None) or ()) if layer == -1 else ()


def _select_layer(outputs: Any, layer: int, tower: VisionTower | None = None) -> Tensor:
    if layer == -1:
        return outputs.last_hidden_state if tower is None or tower.features is None else tower.features(outputs)
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
