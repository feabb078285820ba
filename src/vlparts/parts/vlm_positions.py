"""Three-axis positions of a batch of a composed model: padded, or several texts packed into one row.

Shapes: B samples, S tokens of a row, n images or videos.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from .rope_multimodal import AXES, get_multimodal_position_ids

_IMAGE, _VIDEO = 1, 2


def check_cache_positions(position_ids: Tensor | None, past_key_values: Cache | None, has_media: bool) -> None:
    """Check that positions are given if a cache holds tokens, since it does not store multimodal positions.

    Args:
        position_ids: As the caller gave them, None or `(B, S)`.
        past_key_values: The cache.
        has_media: Whether the new tokens hold images or videos.

    Raises:
        ValueError: If the cache holds tokens, and positions are absent, or `(B, S)` for new images or videos.
    """
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    if past and (position_ids is None or has_media):
        raise ValueError(
            "`position_ids` must be given with a cache that holds tokens, as it does not keep multimodal positions; "
            "expected (4, samples, tokens), the last columns of `get_multimodal_position_ids` for the whole text."
        )


def _text_positions(shape: torch.Size, attended: Tensor, position_ids: Tensor | None) -> Tensor:
    """Position `(B, S)` of each token in its text."""
    if position_ids is None:
        return (attended.cumsum(-1) - 1).clamp(min=0)
    if position_ids.ndim != 2 or position_ids.shape[1] != shape[1] or position_ids.shape[0] not in (1, shape[0]):
        raise ValueError(f"`position_ids` must have shape {tuple(shape)}, got {tuple(position_ids.shape)}.")
    return position_ids.expand(shape).masked_fill(~attended, 0)


def _text_lengths(text_positions: Tensor, attended: Tensor) -> list[int]:
    """Number of tokens of each text, row after row, from the positions of the tokens."""
    flat = text_positions[attended]
    rows = attended.sum(-1).cumsum(0)
    starts = flat == 0
    index = torch.arange(len(flat), device=flat.device)
    first = torch.where(starts, index, 0).cummax(0).values
    row_starts = torch.cat((rows.new_zeros(1), rows[:-1]))
    if not torch.equal(index - first, flat) or not starts[row_starts.clamp(max=len(flat) - 1)].all():
        raise ValueError(
            "`position_ids` of shape (samples, tokens) must count 0, 1, 2, ... in each text; the positions of images "
            "and videos follow from them. Other positions are given as (4, samples, tokens)."
        )
    return torch.diff(starts.nonzero().flatten(), append=index.new_tensor([len(flat)])).tolist()


def multimodal_positions(
    image_mask: Tensor,
    video_mask: Tensor,
    *,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    merge_size: int = 1,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Compute the position in the text, T, H and W of each token; see [`get_multimodal_position_ids`].

    Args:
        image_mask: `(B, S)` bool, true at the placeholders of images.
        video_mask: `(B, S)` bool, true at the placeholders of videos.
        image_grid_thw: `(n, 3)` grids of the images in patches, text after text.
        video_grid_thw: `(n, 3)` grids of the videos.
        merge_size: Side m of the block of patches that becomes one token.
        attention_mask: `(B, S)`, 0 at padding.
        position_ids: `(B, S)` or `(1, S)` positions that count from 0 in each text. A row in which they restart at 0
            holds several texts, each with the positions that it has alone. None for one text per row.

    Returns:
        `(4, B, S)` int64, 0 at padding.

    Raises:
        ValueError: If a shape does not fit, `position_ids` do not count from 0 in each text, or placeholders and
            grids do not match (names the text as "sample").
    """
    if attention_mask is not None and attention_mask.shape != image_mask.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of the tokens, {tuple(image_mask.shape)}, got "
            f"{tuple(attention_mask.shape)}: multimodal positions follow from the whole text. Give all of it, also "
            "with a cache, or `position_ids`."
        )
    attended = torch.ones_like(image_mask) if attention_mask is None else attention_mask != 0
    text_positions = _text_positions(image_mask.shape, attended, position_ids)
    positions = torch.zeros(AXES + 1, *text_positions.shape, dtype=torch.int64, device=text_positions.device)
    positions[0] = text_positions
    if attended.any():
        lengths = _text_lengths(text_positions, attended)
        kinds = (image_mask * _IMAGE + video_mask * _VIDEO)[attended].split(lengths)
        inside = pad_sequence([torch.ones_like(text) for text in kinds], batch_first=True) != 0
        found, _ = get_multimodal_position_ids(
            pad_sequence(list(kinds), batch_first=True),
            image_token_id=_IMAGE,
            image_grid_thw=image_grid_thw,
            video_token_id=_VIDEO,
            video_grid_thw=video_grid_thw,
            spatial_merge_size=merge_size,
            attention_mask=inside,
        )
        positions[1:, attended] = found[:, inside]
    return positions
