"""Multimodal rotary positions (M-RoPE) of a language model: three axes, time, row and column, share the frequencies.

Shapes: B samples of S tokens, D channels of a head, so D/2 frequencies; n images or videos. Axes are 0 for time (T),
1 for rows (H), 2 for columns (W). A frame of h x w patches takes h*w / m^2 placeholder tokens, where m x m patches
become one token.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin

from .utils import positive_integer

AXES = 3
_TEXT, _IMAGE, _VIDEO = 0, 1, 2
_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check_sections(sections: Sequence[int]) -> None:
    integers = isinstance(sections, (list, tuple)) and all(type(one) is int and one >= 0 for one in sections)
    if not integers or len(sections) != AXES or not sum(sections):
        raise ValueError(
            "`mrope_section` must hold three integers, the frequencies of time, rows and columns, none negative and "
            f"not all zero, got {sections!r}."
        )


def interleave_axes(sections: Sequence[int], force_last: bool = True) -> list[int]:
    """Spread the axes over the frequencies, such that each has fast and slow ones.

    Slot by slot the axis is taken whose share is filled least (the lower axis, if equal), but not the one before as
    long as there is another. This is the order of openPangu-VL, in which [10, 27, 27] gives nine times THWHWHW and a
    T. Qwen3-VL interleaves differently.

    Args:
        sections: Number of frequencies of T, H and W.
        force_last: Whether the slowest frequency is kept for T.

    Returns:
        The axis of each of the `sum(sections)` frequencies, fastest first.

    Raises:
        ValueError: If `sections` are not three counts, or if T has none to keep for the last place.
    """
    _check_sections(sections)
    if force_last and not sections[0]:
        raise ValueError(f"`mrope_section` must give time a frequency if `force_last`, got {list(sections)}.")
    counts = [sections[0] - force_last, *sections[1:]]
    placed, axes = [0] * AXES, list[int]()
    for _ in range(sum(counts)):
        left = [axis for axis in range(AXES) if placed[axis] < counts[axis]]
        others = [axis for axis in left if not axes or axis != axes[-1]]
        chosen = min(others or left, key=lambda axis: placed[axis] / counts[axis])
        placed[chosen] += 1
        axes.append(chosen)
    return axes + [0] * force_last


def rotary_axes(rope_parameters: Mapping[str, Any], slots: int) -> list[int]:
    """The axis of each frequency, from a configuration's `rope_parameters`.

    Args:
        rope_parameters: "mrope_section", the frequencies of T, H and W, and "mrope_interleaved": true for the order
            of [`interleave_axes`], false (or absent) for one axis after the other as in Qwen2-VL (arXiv 2409.12191,
            section 2.1). Without sections all frequencies turn with T, which is plain RoPE.
        slots: Number D/2 of frequencies.

    Returns:
        `slots` axes, fastest frequency first.

    Raises:
        ValueError: If the sections are malformed or do not add up to `slots`, if "mrope_interleaved" is not a bool, or
            is true without sections.
    """
    sections, interleaved = rope_parameters.get("mrope_section"), rope_parameters.get("mrope_interleaved", False)
    if type(interleaved) is not bool or (interleaved and sections is None):
        raise ValueError(
            f"`mrope_interleaved` must be true or false, and true only with `mrope_section`, got {interleaved!r}."
        )
    if sections is None:
        return [0] * slots
    _check_sections(sections)
    if sum(sections) != slots:
        raise ValueError(
            f"`mrope_section` must add up to half of `head_dim`, {slots}, got {list(sections)} (sum {sum(sections)})."
        )
    if interleaved:
        return interleave_axes(sections)
    return [axis for axis, count in enumerate(sections) for _ in range(count)]


def multimodal_rotary(position_ids: Tensor, inv_freq: Tensor, axes: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Angles by which the channels of a head are rotated, from three positions of each token.

    Channel c is rotated together with channel c + D/2. Where the three positions are equal this is plain RoPE, to the
    bit.

    Args:
        position_ids: `(3, B, S)` integers, T, H and W.
        inv_freq: `(D/2,)` frequencies in radians per position.
        axes: `(D/2,)` the axis of each frequency, int64 if a tensor; see [`rotary_axes`].

    Returns:
        Cosines and sines, each `(B, S, D)` float32.

    Raises:
        ValueError: If a shape is another, or a number in `axes` is no axis (not checked in a tensor: that would wait
            for the device).
    """
    if position_ids.ndim != 3 or position_ids.shape[0] != AXES:
        raise ValueError(f"`position_ids` must have shape (3, samples, tokens), got {tuple(position_ids.shape)}.")
    if not isinstance(axes, Tensor):
        if not set(axes) <= set(range(AXES)):
            raise ValueError(f"`axes` must hold 0, 1 and 2, got {list(axes)}.")
        axes = torch.tensor(axes, dtype=torch.int64)
    if inv_freq.ndim != 1 or axes.shape != inv_freq.shape:
        raise ValueError(
            f"`axes` must hold one axis for each frequency of `inv_freq`, got {tuple(axes.shape)} and "
            f"{tuple(inv_freq.shape)}."
        )
    device = position_ids.device
    positions = position_ids.float().movedim(0, -1).index_select(-1, axes.to(device))
    angles = positions * inv_freq.to(device=device, dtype=torch.float32)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class _Grids:
    """The grids of images or of videos of a batch, handed out frame by frame."""

    def __init__(self, name: str, grid_thw: Tensor | None, merge_size: int) -> None:
        self.name, self.taken, self.frames_left = name, 0, 0
        self.sizes: list[list[int]] = []
        if grid_thw is None:
            return
        if grid_thw.dtype not in _INTEGER_DTYPES or grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
            raise ValueError(
                f"`{name}` must be an integer tensor of shape (n, 3), got {grid_thw.dtype} of shape "
                f"{tuple(grid_thw.shape)}."
            )
        self.sizes = grid_thw.tolist()
        for index, (frames, rows, columns) in enumerate(self.sizes):
            if min(frames, rows, columns) < 1 or rows % merge_size or columns % merge_size:
                raise ValueError(
                    f"`{name}[{index}]` must hold positive frames, rows and columns, the last two multiples of "
                    f"`spatial_merge_size`={merge_size}, got {[frames, rows, columns]}."
                )
            self.sizes[index] = [frames, rows // merge_size, columns // merge_size]

    def next_frame(self, sample: int, placeholders: int) -> tuple[int, int]:
        """Rows and columns of the next frame in tokens, which must fit into the placeholders that follow."""
        if not self.frames_left:
            if self.taken == len(self.sizes):
                raise ValueError(
                    f"Sample {sample} has {placeholders} placeholders more than `{self.name}` describes; it holds "
                    f"{len(self.sizes)} grids."
                )
            self.frames_left = self.sizes[self.taken][0]
            self.taken += 1
        self.frames_left -= 1
        _, rows, columns = self.sizes[self.taken - 1]
        if rows * columns > placeholders:
            raise ValueError(
                f"Sample {sample} has {placeholders} placeholders in a row where a frame of "
                f"`{self.name}[{self.taken - 1}]` takes {rows * columns}."
            )
        return rows, columns

    def check_whole(self, sample: int) -> None:
        """Refuse a video that goes on after its sample."""
        if self.frames_left:
            raise ValueError(
                f"Sample {sample} ends with {self.frames_left} frames of `{self.name}[{self.taken - 1}]` without "
                "placeholders."
            )

    def check_used(self, samples: int) -> None:
        """Refuse grids that no placeholder stands for."""
        if self.taken < len(self.sizes):
            raise ValueError(
                f"`{self.name}` holds {len(self.sizes)} grids, but the {samples} samples have placeholders for "
                f"{self.taken} of them."
            )


def _frame_positions(start: int, rows: int, columns: int) -> Tensor:
    """`(3, rows * columns)`: the frame's first position, plus the row, plus the column."""
    places = torch.arange(rows * columns)
    return start + torch.stack((torch.zeros_like(places), places // columns, places % columns))


def _sample_positions(kinds: list[int], grids: dict[int, _Grids], sample: int) -> tuple[Tensor, int]:
    """Positions `(3, tokens)` of the attended tokens of one sample, and the position that comes next."""
    parts, start = [torch.empty(AXES, 0, dtype=torch.int64)], 0
    for kind, run in groupby(kinds):
        length = len(list(run))
        if kind == _TEXT:
            parts.append(torch.arange(start, start + length).expand(AXES, -1))
            start, length = start + length, 0
        while length:
            rows, columns = grids[kind].next_frame(sample, length)
            parts.append(_frame_positions(start, rows, columns))
            start, length = start + max(rows, columns), length - rows * columns
    for one in grids.values():
        one.check_whole(sample)
    return torch.cat(parts, dim=1), start


def _kinds_of_tokens(input_ids: Tensor, image_token_id: int, video_token_id: int | None, has_videos: bool) -> Tensor:
    if input_ids.dtype not in _INTEGER_DTYPES or input_ids.ndim != 2:
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
) -> tuple[Tensor, Tensor]:
    """Positions T, H and W of each token of texts with images and videos, as in openPangu-VL.

    A text token has the next free position p on all axes. The token of row a and column b of a frame has
    (p, p + a, p + b), and what follows the frame goes on at p plus the longer side. So T is constant in a frame, and
    counts no seconds. The frames of a video follow each other, and whatever tokens stand between them (the marks of
    end and start) are text. For texts and single images this is Qwen2-VL's (arXiv 2409.12191, section 2.1).

    Works on the host; call it once for a prompt. Tokens that are generated later have p = their place among the
    attended tokens plus `rope_deltas`.

    Args:
        input_ids: `(B, S)` integers; a placeholder for each token of an image or of a video's frame.
        image_token_id: Id of the image placeholder.
        image_grid_thw: `(n, 3)` frames, rows and columns of each image in patches, sample after sample. Several
            frames are treated as those of a video. Images may follow each other without a token between.
        video_token_id: Id of the video placeholder.
        video_grid_thw: `(n, 3)` the same for videos.
        spatial_merge_size: Side m of the block of patches that becomes one token.
        attention_mask: `(B, S)`, 0 at padding, on whichever side; None if there is none.

    Returns:
        `position_ids` `(3, B, S)` int64, 0 at padding; `rope_deltas` `(B, 1)` int64, the next free position minus the
        number of attended tokens.

    Raises:
        ValueError: If a tensor has another shape or dtype, or if the placeholders of a sample are not those of its
            grids; names the sample and the grids.
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
        _IMAGE: _Grids("image_grid_thw", image_grid_thw, merge_size),
        _VIDEO: _Grids("video_grid_thw", video_grid_thw, merge_size),
    }
    position_ids = torch.zeros(AXES, *kinds.shape, dtype=torch.int64)
    rope_deltas = torch.zeros(len(kinds), 1, dtype=torch.int64)
    for sample, mask in enumerate(attended):
        tokens = kinds[sample, mask].tolist()
        position_ids[:, sample, mask], following = _sample_positions(tokens, grids, sample)
        rope_deltas[sample] = following - len(tokens)
    for one in grids.values():
        one.check_used(len(kinds))
    return position_ids.to(input_ids.device), rope_deltas.to(input_ids.device)


__all__ = [
    "get_multimodal_position_ids",
    "interleave_axes",
    "multimodal_rotary",
    "rotary_axes",
]


class MultiAxisGenerationMixin(GenerationMixin):
    """transformers' `generate` for `position_ids` that may have axes: `(B, S)`, `(3, B, S)` or `(4, B, S)`."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        # Older transformers repeat the first dimension, which here may be the axes.
        position_ids = model_kwargs.pop("position_ids", None)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if position_ids is not None:
            model_kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=-2)
        return input_ids, model_kwargs
