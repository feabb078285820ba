"""Fewer tokens of images in the composed model: which tokens belong together, and where those that are left are.

Shapes: n images or videos, T tokens of all of them (blocks of m x m patches), K tokens that are left, D width.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .packed_index import get_patch_layout
from .rope_multimodal import FramePlaces
from .token_reduction import ReducedTokens, VisionTokenReducer
from .vlm_features import get_class_tokens, require_inputs
from .vlm_views import sum_views


class TokenFrames(NamedTuple):
    """Tokens of images, frames of videos, or views, which are reduced separately.

    Attributes:
        lengths: Number of tokens of each frame.
        sizes: Rows and columns of each frame in tokens.
        position_ids: `(T, 2)` int64 row and column of each token; None if no token is missing in the frames.
        counts: Number of frames of each image or video.
    """

    lengths: list[int]
    sizes: list[tuple[int, int]]
    position_ids: Tensor | None
    counts: list[int]


def build_reducer(config: PreTrainedConfig) -> VisionTokenReducer | None:
    """Build the reducer of a composed model, or None if its tokens are not reduced."""
    reduction = config.reduction
    if reduction is None:
        return None
    width = config.text_config.hidden_size
    if config.token_stage == "encoder":
        width = config.vision_width * (config.projector_merge_size // reduction.factor) ** 2
    return VisionTokenReducer(reduction.method, reduction.ratio, reduction.count, width=width, **reduction.options)


def get_frames(grid_thw: Tensor, merge_size: int, keep_index: Tensor | None = None) -> TokenFrames:
    """Find the tokens of each frame.

    Args:
        grid_thw: `(n, 3)` frames, rows and columns of each image or video in patches.
        merge_size: m.
        keep_index: `(L,)` int64 patches that are there, whole blocks of them; None for all.

    Raises:
        ValueError: If `keep_index` holds a part of a block, padding, or none of a frame.
    """
    grids = grid_thw.tolist()
    counts = [frames for frames, _, _ in grids]
    sizes = [(rows // merge_size, columns // merge_size) for frames, rows, columns in grids for _ in range(frames)]
    if keep_index is None:
        return TokenFrames([rows * columns for rows, columns in sizes], sizes, None, counts)
    check_whole_blocks(keep_index, merge_size)
    layout = get_patch_layout(grid_thw, len(keep_index), merge_size, keep_index)
    starts = torch.tensor([0, *accumulate(counts)], device=keep_index.device)
    first = slice(None, None, merge_size**2)
    frames = (starts[layout.image_ids] + layout.frame_ids)[first]
    lengths = torch.bincount(frames, minlength=len(sizes)).tolist()
    if 0 in lengths or len(lengths) > len(sizes):
        raise ValueError(f"`image_keep_index` must keep a block of each frame, without padding, got {lengths} blocks.")
    return TokenFrames(lengths, sizes, layout.position_ids[first] // merge_size, counts)


def check_whole_blocks(keep_index: Tensor, merge_size: int) -> None:
    """Check that patches are whole blocks of m x m.

    Raises:
        ValueError: If `keep_index` holds a part of a block.
    """
    area = merge_size**2
    if len(keep_index) % area == 0:
        blocks = keep_index.view(-1, area)
        inside = torch.arange(area, device=keep_index.device)
        if bool((blocks == blocks[:, :1] // area * area + inside).all()):
            return
    raise ValueError(
        f"`image_keep_index` must hold whole blocks of {merge_size} x {merge_size} patches, which become one token, "
        f"got {keep_index.tolist()}."
    )


def reduce_frames(
    reducer: VisionTokenReducer, tokens: Tensor, frames: TokenFrames, class_tokens: Tensor | None = None
) -> ReducedTokens:
    """Reduce the tokens `(T, D)` of each frame."""
    if frames.position_ids is None:
        return reducer(tokens, frames.sizes, class_tokens=class_tokens)
    return reducer(tokens, lengths=frames.lengths, position_ids=frames.position_ids, class_tokens=class_tokens)


def reduce_and_project(
    model: Any,
    outputs: Any,
    features: tuple[Tensor, ...],
    grid_thw: Tensor | None,
    keep_index: Tensor | None = None,
    square_tiles: Tensor | None = None,
) -> BaseModelOutputWithPooling:
    """Project the patches of encoded images, with fewer tokens than their grids say.

    Args:
        model: A model with a `vision_tower`, a `projector` and a `token_reducer`, which may be None.
        outputs: Output of the vision encoder.
        features: `(L, D)` patches of each feature layer.
        grid_thw: `(n, 3)` grids of the images or videos in patches.
        keep_index: `(L,)` int64 patches that are there; None for all.
        square_tiles: `(images, 2)` tiles of images of several views.

    Returns:
        The output with `pooler_output`, `token_reduction` and `token_places`; see [`get_image_features`].
    """
    require_inputs(image_grid_thw=grid_thw)
    assert grid_thw is not None
    frames = get_frames(grid_thw, model.config.merge_size, keep_index)
    reducer, reduced = model.token_reducer, None
    if reducer is not None and model.config.token_stage == "encoder":
        class_tokens = None
        if reducer.reduction.options.get("query") == "class_token":
            class_tokens = get_class_tokens(model.vision_tower, outputs, model.config.vision_feature_layer)
        units = features[0].reshape(sum(frames.lengths), -1)
        reduced = reduce_frames(reducer, units, frames, class_tokens)
        features = (reduced.tokens.reshape(-1, features[0].shape[-1]),)
    tokens = model.projector(*features)
    if reducer is not None and reduced is None:
        reduced = reduce_frames(reducer, tokens, frames)
        tokens = reduced.tokens
    lengths = sum_frames(frames.lengths if reduced is None else reduced.lengths, frames.counts)
    if square_tiles is not None:
        lengths = sum_views(torch.tensor(lengths), square_tiles.cpu()).tolist()
    outputs.pooler_output, outputs.token_reduction = tokens.split(lengths), reduced
    if model.config.has_multimodal_positions:  # which are computed on the host
        outputs.token_places = get_places(frames, reduced)
    return outputs


def reduce_views(
    reducer: VisionTokenReducer, tokens: Tensor, view_index: Tensor, lengths: Sequence[int]
) -> ReducedTokens:
    """Reduce the tokens of assembled images, but not their newlines and separators.

    Args:
        reducer: The reducer.
        tokens: `(T, E)` assembled images.
        view_index: `(T,)` int64 of [`get_view_index`]; the two largest possible values are the marks.
        lengths: Number of tokens of each image.

    Returns:
        What is left of all tokens, the marks among them.
    """
    is_mark = view_index >= view_index.max() - 1  # every image has both marks
    marks, others = (mask.nonzero().squeeze(1) for mask in (is_mark, ~is_mark))
    counts = [int(part.sum()) for part in (~is_mark).split(list(lengths))]
    reduced = reducer(tokens[others], lengths=counts)
    places, order = torch.cat((others[reduced.kept_index], marks)).sort()
    rank = order.argsort()
    assignment = torch.full_like(view_index, -1)
    assignment[others] = torch.where(reduced.assignment < 0, -1, rank[reduced.assignment])
    assignment[marks] = rank[len(reduced.tokens) :]
    return ReducedTokens(
        torch.cat((reduced.tokens, tokens[marks]))[order],
        [left + length - count for left, length, count in zip(reduced.lengths, lengths, counts, strict=True)],
        places,
        assignment,
        torch.cat((reduced.sizes, reduced.sizes.new_ones(len(marks))))[order],
    )


def get_places(frames: TokenFrames, reduced: ReducedTokens | None) -> list[FramePlaces]:
    """Return where the tokens of each frame are, for a text model with multimodal rotary positions.

    A token has the place of the one that it stands for, and the text goes on as after all tokens. The queries of a
    resampler have no place in the image; they count as a text does.
    """
    lengths = frames.lengths if reduced is None else reduced.lengths
    places = []
    positions = frames.position_ids
    if positions is None:
        grids = (torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in frames.sizes)
        positions = torch.cat([grid.view(-1, 2) for grid in grids])
    positions = positions.cpu()
    index = torch.arange(len(positions)) if reduced is None else reduced.kept_index.cpu()
    for part, size in zip(index.split(lengths), frames.sizes, strict=True):
        if len(part) and int(part[0]) < 0:
            places.append(FramePlaces(torch.arange(len(part)).expand(3, -1), len(part)))
        else:
            offsets = torch.nn.functional.pad(positions[part], (1, 0))
            places.append(FramePlaces(offsets.T, max(size)))
    return places


def find_places(model: Any, grid_thw: Tensor | None, outputs: Any = None) -> list[FramePlaces] | None:
    """Return where the tokens of images or videos are; None if they are all tokens of their grids.

    Args:
        model: A model with a `token_reducer`, which may be None.
        grid_thw: `(n, 3)` grids in patches; None without images.
        outputs: The encoded images, if they are.

    Raises:
        ValueError: If the features decide it, and there are no outputs.
    """
    places = getattr(outputs, "token_places", None)
    if places is not None or grid_thw is None or model.token_reducer is None:
        return places
    if model.config.reduction.kind.chooses:
        raise ValueError(
            f"`mm_encoder_outputs` must be given for positions of tokens with `token_reduction` "
            f"{model.config.token_reduction!r}, whose features decide which are left. To go on from a cache, pass "
            "`position_ids`."
        )
    return predict_places(model.token_reducer, get_frames(grid_thw, model.config.merge_size))


def predict_places(reducer: VisionTokenReducer, frames: TokenFrames) -> list[FramePlaces]:
    """Return where tokens will be, for methods that leave the same ones whatever the features are."""
    if reducer.resampler is not None:
        count = len(reducer.resampler.queries)
        return [FramePlaces(torch.arange(count).expand(3, -1), count) for _ in frames.lengths]
    return get_places(frames, reducer(torch.zeros(sum(frames.lengths), 1), frames.sizes))


def sum_frames(lengths: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Sum the lengths of the frames of each image or video."""
    remaining = iter(lengths)
    return [sum(next(remaining) for _ in range(count)) for count in counts]
