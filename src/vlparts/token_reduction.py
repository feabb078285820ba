"""Fewer vision tokens for a model as it is: its inputs are encoded, reduced, and their placeholders removed.

Shapes: B samples, S tokens per sample, T tokens of all images, K that are left.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_utils import PreTrainedModel

from .parts.token_reduction import ReducedTokens, VisionTokenReducer
from .parts.token_reduction_types import TokenReduction
from .parts.utils import IGNORE_INDEX
from .parts.vlm_features import get_image_grids
from .parts.vlm_reduction import get_frames, reduce_frames, reduce_views, sum_frames

__all__ = ["VisionTokenReducer", "reduce_tokens"]

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@torch.no_grad()
def reduce_tokens(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    method: str,
    ratio: float | None = None,
    count: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Encode the images and videos of a processor's output, and leave fewer tokens of each.

    The result is for `generate` or `forward` of the same model, which is not changed. It works for every model whose
    `forward` takes `mm_encoder_outputs`: composed ones, and of transformers' own LLaVA, Qwen2-VL, Qwen2.5-VL,
    InternVL, Lfm2-VL (with Siglip2) and others. With multimodal rotary positions each token keeps that of the one it
    stands for, and the text those that it had. No gradient reaches the vision encoder and the projector; to train them
    with fewer tokens, pass `token_reduction` to `compose`.

    Args:
        model: A model with a language head.
        inputs: `input_ids` `(B, S)`, `attention_mask`, images, videos, and what else the processor returns. Tensors
            `(B, S)`, such as `labels`, get the columns that are left.
        method: Name of a method without weights that keeps the width of tokens; see [`TokenReduction`].
        ratio: Share of the tokens of an image, or of a frame of a video, that is left.
        count: Number of tokens that are left.
        **options: Options of the method.

    Returns:
        The inputs with `mm_encoder_outputs` in place of pixels and grids. Each output has the [`ReducedTokens`] as
        `token_reduction`.

    Raises:
        ValueError: If the model has no such argument, reduces its tokens itself, or adds features of images to further
            layers; there are no images; the method has weights or widens tokens; or placeholders and features do not
            match.
    """
    reduction = TokenReduction(method, ratio, count, options)
    if reduction.kind.widens or method == "resampler" or options.get("query") == "class_token":
        raise ValueError(
            f"`method` must be one that needs no training of the model and only its tokens, got {method!r} with "
            f"{options}; `compose` takes it as `token_reduction`."
        )
    _check_model(model)
    reducer, base = VisionTokenReducer(method, ratio, count, **options), model.base_model
    input_ids, rest = inputs["input_ids"], dict(inputs)
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    encoded: dict[str, Any] = {}
    for kind, pixels in _PIXELS.items():
        if inputs.get(pixels) is None:
            continue
        encode = getattr(base, f"get_{kind}_features")
        names = [name for name in inspect.signature(encode).parameters if name in inputs]
        outputs = encode(**{name: inputs[name] for name in names}, return_dict=True)
        if getattr(outputs, "deepstack_features", None) is not None:
            raise ValueError(
                f"`model` {type(model).__name__} adds features of {kind}s to several layers, which cannot be reduced."
            )
        reduced, lengths = _reduce(reducer, base, outputs, inputs, kind)
        placeholders = (input_ids == _token_id(model, kind)).flatten().nonzero().squeeze(1)
        if len(placeholders) != len(reduced.assignment):
            raise ValueError(
                f"`inputs` have {len(placeholders)} {kind} tokens, but {len(reduced.assignment)} {kind} features."
            )
        kept.view(-1)[placeholders] = False
        kept.view(-1)[placeholders[reduced.kept_index.to(placeholders.device)]] = True
        parts: Any = reduced.tokens.split(lengths)
        if isinstance(outputs.pooler_output, Tensor):  # of images of one size
            parts = torch.stack(parts)
        outputs.pooler_output, outputs.token_reduction = parts, reduced
        encoded[kind] = outputs
        for name in names:
            rest.pop(name, None)
    if not encoded:
        raise ValueError("`inputs` must hold `pixel_values` or `pixel_values_videos`, got neither.")
    positions = _positions(model, inputs)
    rest = _drop_columns(rest, kept, getattr(model.generation_config, "pad_token_id", None) or 0)
    if positions is not None:
        rest["position_ids"] = _text_first(positions, kept, rest["attention_mask"])
    for name in ("image_grid_thw", "video_grid_thw"):
        rest.pop(name, None)
    return {**rest, "mm_encoder_outputs": encoded}


def _check_model(model: PreTrainedModel) -> None:
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"`model` {type(model).__name__} must take `mm_encoder_outputs` in its `forward`, the place at which "
            "transformers' models take encoded images; this one does not."
        )
    if getattr(model.config, "token_reduction", None) is not None:
        raise ValueError(
            f"`model` reduces its tokens itself by {model.config.token_reduction!r}; expected one that does not."
        )


def _token_id(model: PreTrainedModel, kind: str) -> int:
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        if getattr(model.config, name, None) is not None:
            return getattr(model.config, name)
    raise ValueError(f"`model.config.{kind}_token_id` must be set for inputs with {kind}s, got None.")


def _reduce(
    reducer: VisionTokenReducer, base: PreTrainedModel, outputs: Any, inputs: Mapping[str, Any], kind: str
) -> tuple[ReducedTokens, list[int]]:
    """Reduce the features of images or videos; returns also the number of tokens of each."""
    features = list(outputs.pooler_output)
    tokens, lengths = torch.cat(features), [len(part) for part in features]
    view_index, places = getattr(outputs, "view_index", None), getattr(outputs, "token_places", None)
    if view_index is not None:
        reduced = reduce_views(reducer, tokens, view_index, lengths)
        return reduced, reduced.lengths
    grids, merge_size = _grids(base, inputs, kind)
    if grids is not None and places is None:
        frames = get_frames(grids, merge_size)
        if sum_frames(frames.lengths, frames.counts) == lengths:
            reduced = reduce_frames(reducer, tokens, frames)
            return reduced, sum_frames(reduced.lengths, frames.counts)
    reduced = reducer(tokens, lengths=lengths)
    return reduced, reduced.lengths


def _grids(base: PreTrainedModel, inputs: Mapping[str, Any], kind: str) -> tuple[Tensor | None, int]:
    """Frames, rows and columns of images, as far as they are known; and the side of a block that is one token."""
    config, vision = base.config, base.config.vision_config
    merge_size = getattr(config, "spatial_merge_size", None) or getattr(vision, "spatial_merge_size", None)
    merge_size = merge_size or getattr(config, "downsample_factor", None) or 1
    if getattr(config, "downsample_ratio", None):
        merge_size = round(1 / config.downsample_ratio)
    grids, shapes = inputs.get(f"{kind}_grid_thw"), inputs.get("spatial_shapes")
    if kind == "video" or grids is not None:
        return grids, merge_size
    if hasattr(base, "vision_tower") and hasattr(base, "projector"):  # a composed model
        return get_image_grids(base.vision_tower, inputs["pixel_values"], None, shapes), merge_size
    if shapes is not None:
        return torch.nn.functional.pad(shapes, (1, 0), value=1), merge_size
    pixels, sides = inputs["pixel_values"], getattr(vision, "patch_size", None)
    sides = [sides, sides] if isinstance(sides, int) else sides
    if pixels.ndim != 4 or sides is None:
        return None, 1
    rows, columns = (size // side for size, side in zip(pixels.shape[-2:], sides, strict=True))
    return torch.tensor([[1, rows, columns]]).expand(len(pixels), -1), merge_size


def _positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor | None:
    """Time, row and column `(3, B, S)` of all tokens, for models with multimodal rotary positions."""
    base = model.base_model
    if getattr(model.config, "has_multimodal_positions", None) is False or not hasattr(base, "get_rope_index"):
        return None
    names = inspect.signature(base.get_rope_index).parameters
    given = {name: inputs[name] for name in names if inputs.get(name) is not None}
    if "mm_token_type_ids" in names and "mm_token_type_ids" not in given:
        ids = inputs["input_ids"]
        given["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        given["mm_token_type_ids"][ids == model.config.video_token_id] = 2
    positions, _ = base.get_rope_index(**given)
    return positions


def _drop_columns(inputs: dict[str, Any], kept: Tensor, pad_token_id: int) -> dict[str, Any]:
    """Leave the columns of each row that are kept; shorter rows are padded on the side on which the batch is."""
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(kept, dtype=torch.int64)
    left = not bool((mask[:, -1] == 0).any())
    fills = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    tokens = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == kept.shape}
    tokens["attention_mask"] = mask
    return inputs | {name: _pad_rows(value, kept, left, fills.get(name, 0)) for name, value in tokens.items()}


def _pad_rows(values: Tensor, kept: Tensor, left: bool, fill: int) -> Tensor:
    rows: Sequence[Tensor] = [row[mask] for row, mask in zip(values, kept, strict=True)]
    side = "left" if left else "right"
    return pad_sequence(list(rows), batch_first=True, padding_value=fill, padding_side=side)


def _text_first(positions: Tensor, kept: Tensor, attention_mask: Tensor) -> Tensor:
    """Positions `(4, B, S)` of the tokens that are left: in the text, then time, row and column."""
    left = not bool((attention_mask[:, -1] == 0).any())
    text = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return torch.stack([text, *(_pad_rows(axis, kept, left, 0) for axis in positions.to(kept.device))])
