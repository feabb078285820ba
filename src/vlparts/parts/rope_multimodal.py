"""Multimodal rotary positions (M-RoPE) of language models, and generation with them.

The frequencies are divided among three axes: 0 is time (T), 1 rows (H), 2 columns (W). A frame of h x w patches has
h*w / m^2 placeholder tokens, where m x m patches become one token.

Shapes: `B` samples of `S` tokens, `D` channels of a head and D/2 frequencies, `n` images or videos.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .decoders import GrowingCacheGenerationMixin
from .packed_index import INTEGER_DTYPES, check_grid_layout
from .utils import positive_integer

__all__ = [
    "FramePlaces",
    "MultiAxisGenerationMixin",
    "get_multimodal_position_ids",
    "interleave_axes",
    "multimodal_rotary",
    "rotary_axes",
]

AXES = 3
_TEXT, _IMAGE, _VIDEO = 0, 1, 2


def _check_sections(sections: Sequence[int]) -> None:
    integers = isinstance(sections, (list, tuple)) and all(type(one) is int and one >= 0 for one in sections)
    if not integers or len(sections) != AXES or not sum(sections):
        raise ValueError(
            "`mrope_section` must hold three integers, the frequencies of time, rows and columns, none negative and "
            f"not all zero, got {sections!r}."
        )


def interleave_axes(sections: Sequence[int], force_last: bool = True) -> list[int]:
    """Interleave the axes over the frequencies, such that each axis has fast and slow ones.

    Each frequency gets the axis with the smallest filled share of its section (the lower axis of equals), other than
    the previous axis if possible. This is the order of openPangu-VL, in which [10, 27, 27] gives nine times THWHWHW
    and one T. Qwen3-VL interleaves differently.

    Args:
        sections: Number of frequencies of T, H and W.
        force_last: Whether the slowest frequency is reserved for T.

    Returns:
        The axis of each of the `sum(sections)` frequencies, fastest first.

    Raises:
        ValueError: If `sections` are not three counts, or `force_last` is set and T has no frequency.
    """
    _check_sections(sections)
    if force_last and not sections[0]:
        raise ValueError(f"`mrope_section` must give time a frequency with `force_last`, got {list(sections)}.")
    counts = [sections[0] - force_last, *sections[1:]]
    placed, axes = [0] * AXES, list[int]()
    for _ in range(sum(counts)):
        unfilled = [axis for axis in range(AXES) if placed[axis] < counts[axis]]
        others = [axis for axis in unfilled if not axes or axis != axes[-1]]
        chosen = min(others or unfilled, key=lambda axis: placed[axis] / counts[axis])
        placed[chosen] += 1
        axes.append(chosen)
    return axes + [0] * force_last


def rotary_axes(rope_parameters: Mapping[str, Any], num_frequencies: int) -> list[int]:
    """Axis of each frequency, from a configuration's `rope_parameters`.

    Args:
        rope_parameters: "mrope_section", the frequencies of T, H and W, and "mrope_interleaved": true for the order
            of [`interleave_axes`], false (or absent) for one axis after the other as in Qwen2-VL (arXiv 2409.12191,
            section 2.1). Without sections all frequencies belong to T, which is plain RoPE.
        num_frequencies: D/2.

    Returns:
        `(D/2,)` axes, fastest frequency first.

    Raises:
        ValueError: If the sections are malformed or do not sum to D/2, or "mrope_interleaved" is not a bool, or is
            true without sections.
    """
    sections, interleaved = rope_parameters.get("mrope_section"), rope_parameters.get("mrope_interleaved", False)
    if type(interleaved) is not bool or (interleaved and sections is None):
        raise ValueError(
            f"`mrope_interleaved` must be true or false, and true only with `mrope_section`, got {interleaved!r}."
        )
    if sections is None:
        return [0] * num_frequencies
    _check_sections(sections)
    if sum(sections) != num_frequencies:
        raise ValueError(
            f"`mrope_section` must sum to half of `head_dim`, {num_frequencies}, got {list(sections)} (sum "
            f"{sum(sections)})."
        )
    if interleaved:
        return interleave_axes(sections)
    return [axis for axis, count in enumerate(sections) for _ in range(count)]


def multimodal_rotary(position_ids: Tensor, inv_freq: Tensor, axes: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of each token, from its three positions.

    Channel c is rotated together with channel c + D/2. Where the three positions are equal, this is plain RoPE to the
    bit.

    Args:
        position_ids: `(3, B, S)` integers, T, H and W.
        inv_freq: `(D/2,)` frequencies in radians per position.
        axes: `(D/2,)` axis of each frequency, see [`rotary_axes`]; int64 if a tensor.

    Returns:
        Cosines and sines, each `(B, S, D)` float32.

    Raises:
        ValueError: If a shape is wrong, or an element of `axes` is not an axis (not checked for a tensor, which would
            synchronize with the device).
    """
    if position_ids.ndim != 3 or position_ids.shape[0] != AXES:
        raise ValueError(f"`position_ids` must have shape (3, samples, tokens), got {tuple(position_ids.shape)}.")
    if not isinstance(axes, Tensor):
        if not set(axes) <= set(range(AXES)):
            raise ValueError(f"`axes` must hold 0, 1 and 2, got {list(axes)}.")
        axes = torch.tensor(axes, dtype=torch.int64)
    if inv_freq.ndim != 1 or axes.shape != inv_freq.shape:
        raise ValueError(
            f"`axes` must hold one axis per frequency of `inv_freq`, got shapes {tuple(axes.shape)} and "
            f"{tuple(inv_freq.shape)}."
        )
    device = position_ids.device
    positions = position_ids.float().movedim(0, -1).index_select(-1, axes.to(device))
    angles = positions * inv_freq.to(device=device, dtype=torch.float32)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class FramePlaces(NamedTuple):
    """Where the tokens of an image, or of a frame of a video, are.

    Attributes:
        offsets: `(3, K)` int64, time, row and column of each token from the start of the frame.
        extent: Number of positions after which the text goes on.
    """

    offsets: Tensor
    extent: int


class _Grids:
    """Iterator over the frames of the images, or videos, of a batch."""

    def __init__(
        self, name: str, grid_thw: Tensor | None, merge_size: int, places: Sequence[FramePlaces] | None = None
    ) -> None:
        self.name, self.is_given, self.taken, self.frames_left = name, grid_thw is not None, 0, 0
        self.sizes: list[list[int]] = []
        self.places = None if places is None else iter(places)
        if grid_thw is None:
            return
        check_grid_layout(grid_thw, name)
        self.sizes = grid_thw.tolist()
        for index, (frames, rows, columns) in enumerate(self.sizes):
            if min(frames, rows, columns) < 1 or rows % merge_size or columns % merge_size:
                raise ValueError(
                    f"`{name}[{index}]` must hold positive frames, rows and columns, the last two multiples of "
                    f"`spatial_merge_size`={merge_size}, got {[frames, rows, columns]}."
                )
            self.sizes[index] = [frames, rows // merge_size, columns // merge_size]

    def next_frame(self, sample: int, placeholders: int) -> FramePlaces:
        """Places of the tokens of the next frame, of which there must be that many placeholders in a row."""
        if not self.frames_left:
            if not self.is_given:
                raise ValueError(
                    f"`{self.name}` must be given, got None: sample {sample} has {placeholders} placeholders, whose "
                    "positions follow from it. `generate` takes `position_ids` of shape (4, samples, tokens), or none."
                )
            if self.taken == len(self.sizes):
                raise ValueError(
                    f"Sample {sample} has {placeholders} placeholders more than `{self.name}` describes with "
                    f"{len(self.sizes)} grids."
                )
            self.frames_left = self.sizes[self.taken][0]
            self.taken += 1
        self.frames_left -= 1
        _, rows, columns = self.sizes[self.taken - 1]
        frame = _whole_frame(rows, columns) if self.places is None else next(self.places)
        if frame.offsets.shape[1] > placeholders:
            raise ValueError(
                f"Sample {sample} has {placeholders} placeholders in a row where a frame of "
                f"`{self.name}[{self.taken - 1}]` takes {frame.offsets.shape[1]}."
            )
        return frame

    def check_complete(self, sample: int) -> None:
        """Check that no video continues after its sample."""
        if self.frames_left:
            raise ValueError(
                f"Sample {sample} ends with {self.frames_left} frames of `{self.name}[{self.taken - 1}]` without "
                "placeholders."
            )

    def check_used(self, samples: int) -> None:
        """Check that all grids have placeholders."""
        if self.taken < len(self.sizes):
            raise ValueError(
                f"`{self.name}` holds {len(self.sizes)} grids, but the {samples} samples have placeholders for "
                f"{self.taken} of them."
            )


def _whole_frame(rows: int, columns: int) -> FramePlaces:
    """Places of the tokens of a frame with all of them."""
    index = torch.arange(rows * columns)
    offsets = torch.stack((torch.zeros_like(index), index // columns, index % columns))
    return FramePlaces(offsets, max(rows, columns))


def _sample_positions(kinds: list[int], grids: dict[int, _Grids], sample: int) -> tuple[Tensor, int]:
    """Positions `(3, tokens)` of the attended tokens of one sample, and the next position."""
    parts, start = [torch.empty(AXES, 0, dtype=torch.int64)], 0
    for kind, run in groupby(kinds):
        length = len(list(run))
        if kind == _TEXT:
            parts.append(torch.arange(start, start + length).expand(AXES, -1))
            start, length = start + length, 0
        while length:
            frame = grids[kind].next_frame(sample, length)
            parts.append(start + frame.offsets)
            start, length = start + frame.extent, length - frame.offsets.shape[1]
    for modality_grids in grids.values():
        modality_grids.check_complete(sample)
    return torch.cat(parts, dim=1), start


def _kinds_of_tokens(input_ids: Tensor, image_token_id: int, video_token_id: int | None, has_videos: bool) -> Tensor:
    if input_ids.dtype not in INTEGER_DTYPES or input_ids.ndim != 2:
        raise ValueError(
            "`input_ids` must be an integer tensor of shape (samples, tokens), got "
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}."
        )
    if video_token_id is None and has_videos:
        raise ValueError("`video_token_id` must be given with `video_grid_thw`, got None.")
    if video_token_id == image_token_id:
        raise ValueError(f"`video_token_id` must not be `image_token_id`, got {video_token_id} for both.")
    kinds = (input_ids == image_token_id).long() * _IMAGE
    return kinds if video_token_id is None else kinds + (input_ids == video_token_id).long() * _VIDEO


def get_multimodal_position_ids(
    input_ids: Tensor,
    *,
    image_token_id: int,
    image_grid_thw: Tensor | None = None,
    video_token_id: int | None = None,
    video_grid_thw: Tensor | None = None,
    spatial_merge_size: int = 1,
    attention_mask: Tensor | None = None,
    image_places: Sequence[FramePlaces] | None = None,
    video_places: Sequence[FramePlaces] | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions T, H and W of each token of texts with images and videos, as in openPangu-VL.

    A text token has the next position p on all axes. The token at row a and column b of a frame has (p, p + a, p + b),
    and the token after the frame has p plus the longer side. T is constant in a frame and does not count seconds. The
    frames of a video are consecutive; tokens between them (end and start markers) are text. For texts and single
    images the positions are those of Qwen2-VL (arXiv 2409.12191, section 2.1).

    Runs on the host, once per prompt. The position of a token that is generated later is its index among the attended
    tokens plus `rope_deltas`.

    Args:
        input_ids: `(B, S)` integers; one placeholder per token of an image or of a frame of a video.
        image_token_id: Id of the image placeholder.
        image_grid_thw: `(n, 3)` frames, rows and columns of each image in patches, sample after sample. An image of
            several frames is treated as a video. Images may be adjacent, without a token in between.
        video_token_id: Id of the video placeholder.
        video_grid_thw: `(n, 3)` the same for videos.
        spatial_merge_size: Side m of the block of patches that becomes one token.
        attention_mask: `(B, S)`, 0 at padding, on either side; None if there is none.
        image_places: Places of the tokens of each frame of the images, in tokens; None if all tokens of the grids are
            there.
        video_places: The same for videos.

    Returns:
        `position_ids` `(3, B, S)` int64, 0 at padding; `rope_deltas` `(B, 1)` int64, the next position minus the
        number of attended tokens.

    Raises:
        ValueError: If a tensor has another shape or dtype, or the placeholders of a sample do not match its grids.
    """
    merge_size = positive_integer(spatial_merge_size, "spatial_merge_size")
    kinds = _kinds_of_tokens(input_ids, image_token_id, video_token_id, video_grid_thw is not None).cpu()
    if attention_mask is None:
        attention_mask = torch.ones_like(kinds)
    if attention_mask.shape != kinds.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(kinds.shape)}, got "
            f"{tuple(attention_mask.shape)}."
        )
    attended = attention_mask.cpu() != 0
    grids = {
        _IMAGE: _Grids("image_grid_thw", image_grid_thw, merge_size, image_places),
        _VIDEO: _Grids("video_grid_thw", video_grid_thw, merge_size, video_places),
    }
    position_ids = torch.zeros(AXES, *kinds.shape, dtype=torch.int64)
    rope_deltas = torch.zeros(len(kinds), 1, dtype=torch.int64)
    for sample, mask in enumerate(attended):
        tokens = kinds[sample, mask].tolist()
        position_ids[:, sample, mask], following = _sample_positions(tokens, grids, sample)
        rope_deltas[sample] = following - len(tokens)
    for modality_grids in grids.values():
        modality_grids.check_used(len(kinds))
    return position_ids.to(input_ids.device), rope_deltas.to(input_ids.device)


class MultiAxisGenerationMixin(GrowingCacheGenerationMixin):
    """`GenerationMixin` for `position_ids` of shape `(B, S)`, `(3, B, S)` or `(4, B, S)`."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        # Some versions of transformers repeat the first dimension, which may be the axes here.
        position_ids = model_kwargs.pop("position_ids", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if position_ids is not None:
            model_kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=-2)
        return input_ids, model_kwargs
