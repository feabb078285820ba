"""Three-axis positions of a batch of a composed model: padded, or several texts packed into one row.

Shapes: B samples, S tokens of a row, n images or videos.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from .packed_samples import positions_in_samples
from .rope_multimodal import AXES, FramePlaces, get_multimodal_position_ids
from .utils import check_token_inputs
from .vlm_features import get_image_grids
from .vlm_reduction import find_places

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
    image_places: Sequence[FramePlaces] | None = None,
    video_places: Sequence[FramePlaces] | None = None,
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
        image_places: Places of the tokens of each frame of the images; None if all tokens of the grids are there.
        video_places: The same for videos.

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
            image_places=image_places,
            video_places=video_places,
        )
        positions[1:, attended] = found[:, inside]
    return positions


class MultimodalPositionsMixin:
    """Positions of whole texts of a model with a `vision_tower` and placeholders."""

    config: PreTrainedConfig
    vision_tower: PreTrainedModel
    get_placeholder_mask: Callable[..., Tensor]

    def get_multimodal_position_ids(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        pixel_values: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
    ) -> Tensor:
        """Compute positions of whole texts for a text model with multimodal rotary positions.

        `forward` and `generate` call it if `position_ids` are absent. To continue from a cache, `forward` needs the
        columns of the new tokens, and `generate` needs all columns if there are new images. Runs on the host.

        Args:
            input_ids: `(B, S)` int64.
            inputs_embeds: `(B, S, E)` instead of `input_ids`.
            attention_mask: `(B, S)`, 0 at padding.
            position_ids: `(B, S)` positions in the text; a row in which they restart at 0 holds several texts.
            cu_seq_lens_q: `(texts + 1,)` boundaries of the texts of one row, instead of `position_ids`.
            image_grid_thw: `(n, 3)` grids of all images of the texts.
            video_grid_thw: `(n, 3)` grids of all videos.
            pixel_values: `(n, C, H, W)` instead of grids, for encoders of images of one size.
            spatial_shapes: `(n, 2)` instead of grids, for encoders of padded rows of patches.
            mm_encoder_outputs: The encoded images and videos, which say where the tokens are that are left of them;
                needed if features decide it, or patches were dropped.

        Returns:
            `(4, B, S)` int64: position in the text, time, row, column.

        Raises:
            ValueError: If both or neither of `input_ids` and `inputs_embeds` are given, placeholders and grids do not
                match, or `mm_encoder_outputs` are needed.
        """
        check_token_inputs(input_ids, inputs_embeds)
        tokens = inputs_embeds if input_ids is None else input_ids
        if position_ids is None and cu_seq_lens_q is not None:
            position_ids = positions_in_samples(cu_seq_lens_q, tokens.shape[1])
        grids = {
            "image": get_image_grids(self.vision_tower, pixel_values, image_grid_thw, spatial_shapes),
            "video": video_grid_thw,
        }
        masks = [
            torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            if grid is None and getattr(self.config, f"{kind}_token_id") is None
            else self.get_placeholder_mask(input_ids, inputs_embeds, kind)
            for kind, grid in grids.items()
        ]
        encoded = mm_encoder_outputs or {}
        return multimodal_positions(
            *masks,
            image_grid_thw=grids["image"],
            video_grid_thw=grids["video"],
            merge_size=self.config.merge_size,
            attention_mask=attention_mask,
            position_ids=position_ids,
            image_places=find_places(self, grids["image"], encoded.get("image")),
            video_places=find_places(self, grids["video"], encoded.get("video")),
        )
