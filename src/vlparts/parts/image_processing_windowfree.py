"""Image processor of [`WindowFreeViTModel`]: images and videos to packed patches, with Pillow and NumPy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .image_packing import PackedImageProcessor
from .image_pixels import normalize_raw_pixels, patchify
from .image_transforms import (
    check_frame_sizes,
    check_image_size,
    flat_list_of_videos,
    get_area_limits,
    get_frame_area_limits,
    smart_resize,
)

TINY_SIDE = 28
"""Images with a side of at most this many pixels are enlarged first."""
TINY_SIDE_TARGET = 56
"""Shorter side in pixels that they are enlarged to."""
CHANNELS = 3


class WindowFreeViTImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`WindowFreeViTImageProcessor`] in addition to those of every image processor."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    max_aspect_ratio: float
    enlarge_tiny: bool
    video_dynamic_pixels: bool
    video_shared_budget: bool
    video_min_total_pixels: int
    video_max_total_pixels: int
    video_min_frame_pixels: int
    video_max_frame_pixels: int


class WindowFreeViTImageProcessor(PackedImageProcessor):
    """Image processor that cuts images and videos into patches as openPangu-VL does and packs them into one sequence.

    By default images stay raw uint8 pixels, a quarter of the size of float32, which the model normalizes. With
    `do_rescale` and `do_normalize` they are normalized here, in float32. The model distinguishes them by dtype (see
    `image_pixels.py`). Videos are always normalized here. Images and frames are Pillow images, arrays or tensors (and
    images also paths or URLs), and are converted to 8 bits first, see [`image_to_array`].

    An image with a side of at most 28 pixels is first enlarged to a shorter side of 56. Then its size is chosen as in
    Qwen2-VL, see [`smart_resize`]. Patches are in reading order of blocks of `merge_size` x `merge_size` patches.

    Args:
        patch_size: Side P of a patch in pixels.
        merge_size: Side m of the block of patches that a projector merges into one token.
        temporal_patch_size: Must be 1: a row holds one frame, and the model repeats it where its weights have two.
        size: Smallest and largest area of an image in pixels, with the keys "shortest_edge" and "longest_edge".
        max_aspect_ratio: Largest ratio of the longer to the shorter side.
        enlarge_tiny: Whether images with a side of at most 28 pixels are enlarged first, as in openPangu-VL but not in
            Qwen2-VL.
        do_rescale: Divide by 255; only together with `do_normalize`.
        do_normalize: Subtract `image_mean` and divide by `image_std`; only together with `do_rescale`.
        video_dynamic_pixels: Divide the total areas by the number of frames of a call instead of using the limits of a
            frame alone (`any_res_dynamic_video_pixels` in openPangu-VL's files; the limits are named likewise).
        video_shared_budget: Whether the videos of a call share the total areas, as in openPangu-VL; otherwise each has
            them alone, and its size does not depend on the others.
        video_min_total_pixels: Smallest total area of the frames of a call.
        video_max_total_pixels: Largest total area of the frames of a call.
        video_min_frame_pixels: Smallest area of a frame, regardless of the total.
        video_max_frame_pixels: Largest area of a frame, regardless of the total.
        **kwargs: `do_resize`, `resample`, `image_mean`, `image_std`, `do_convert_rgb`, as in every image processor.
    """

    do_resize = True
    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 224 * 224, "longest_edge": 1820 * 1820}
    default_to_square = False
    do_rescale = False
    rescale_factor = 1 / 255
    do_normalize = False
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    patch_size = 14
    temporal_patch_size = 1
    merge_size = 2
    max_aspect_ratio = 200.0
    enlarge_tiny = True
    video_dynamic_pixels = True
    video_shared_budget = True
    video_min_total_pixels = 100352
    video_max_total_pixels = 11239424
    video_min_frame_pixels = 100352
    video_max_frame_pixels = 200704
    grid_options = (*PackedImageProcessor.grid_options, "enlarge_tiny")
    valid_kwargs = WindowFreeViTImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        do_rescale, do_normalize = bool(kwargs["do_rescale"]), bool(kwargs["do_normalize"])
        if do_rescale != do_normalize:
            raise ValueError(
                f"`do_rescale` and `do_normalize` must be equal, got {do_rescale} and {do_normalize}. Set both to "
                "False (raw uint8 pixels, normalized by the model) or both to True."
            )
        if not math.isclose(kwargs["rescale_factor"] or 0.0, 1 / 255):
            raise ValueError(f"`rescale_factor` must be 1/255, got {kwargs['rescale_factor']}.")
        if kwargs["temporal_patch_size"] != 1:
            raise ValueError(
                f"`temporal_patch_size` must be 1, got {kwargs['temporal_patch_size']}: a row holds one frame, and "
                "the model repeats it."
            )
        for name in ("image_mean", "image_std"):
            if not isinstance(kwargs[name], Sequence) or len(kwargs[name]) != CHANNELS:
                raise ValueError(f"`{name}` must have {CHANNELS} values, got {kwargs[name]}.")

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Convert one image to `(3, H, W)` uint8, see [`image_to_array`].

        Raises:
            ValueError: If an image cannot be read, is not RGB, or has levels or axes of unknown meaning.
        """
        array = super().process_image(image, do_convert_rgb, input_data_format, **kwargs)
        if array.shape[0] != CHANNELS:
            raise ValueError(
                f"The image has {array.shape[0]} channels; expected {CHANNELS}. Pass do_convert_rgb=True."
            )
        return array

    def _target_size(self, height: int, width: int, options: dict[str, Any]) -> tuple[int, int]:
        smallest, largest = get_area_limits(options["size"])
        factor = options["patch_size"] * options["merge_size"]
        check_image_size(height, width, options["max_aspect_ratio"])  # so that the message has the original size
        first = enlarge_tiny(height, width) if options["enlarge_tiny"] else (height, width)
        return smart_resize(*first, factor, smallest, largest, options["max_aspect_ratio"])

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        resample: Any,
        do_rescale: bool,
        do_normalize: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        patch_size: int,
        merge_size: int,
        return_tensors: Any = None,
        **options: Any,
    ) -> BatchFeature:
        if not images:
            raise ValueError("`images` is empty; expected at least one image.")
        options |= {"patch_size": patch_size, "merge_size": merge_size}
        packed, grids = [], []
        for image in images:
            if do_resize:
                height, width = image.shape[-2:]
                target = self._target_size(height, width, options)
                if options["enlarge_tiny"]:
                    image = self._resize_to(image, enlarge_tiny(height, width), resample)
                image = self._resize_to(image, target, resample)
            patches, grid = patchify(image[None], patch_size, merge_size)
            packed.append(patches)
            grids.append(grid)
        pixel_values = np.concatenate(packed)
        if do_rescale and do_normalize:
            pixel_values = _normalize(pixel_values, image_mean, image_std)
        data = {"pixel_values": pixel_values, "image_grid_thw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def preprocess_videos(
        self, videos: Any, return_tensors: Any = None, do_sample_frames: bool | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Cut videos into patches, normalized in float32. No frames are dropped or merged.

        The frames of all videos of a call share one budget of pixels, see [`get_frame_area_limits`], so that a long
        video gets smaller frames; with `video_shared_budget=False`, each video has it alone. The option `size` applies
        to images only.

        Args:
            videos: One video or a list of videos, see [`flat_list_of_videos`]. A video is a list of frames, each a
                Pillow image, array or tensor as for images, or an array or tensor `(T, H, W, C)` or `(T, C, H, W)`.
            return_tensors: "pt" or "np".
            do_sample_frames: False or None; frames are sampled beforehand.
            **kwargs: Options that replace the processor's own.

        Returns:
            `pixel_values_videos` `(L, 3*P*P)` float32, and `video_grid_thw` `(n, 3)` int64: frames, rows and columns
            of each video in patches.

        Raises:
            ValueError: If there is no frame, the frames of a video differ in size, or a frame or option is invalid.
        """
        if do_sample_frames or any(kwargs.pop(name, None) is not None for name in ("num_frames", "fps")):
            raise ValueError(
                "`do_sample_frames`, `num_frames` and `fps` must not be set: videos are given as frames, which are "
                f"sampled beforehand, got do_sample_frames={do_sample_frames}."
            )
        options = self._get_video_options(kwargs)
        videos = flat_list_of_videos(videos)
        if not videos:
            raise ValueError("`videos` is empty; expected at least one video.")
        for index, video in enumerate(videos):
            if len(video) == 0:
                raise ValueError(f"`videos[{index}]` has no frames; expected at least one.")
        packed, grids = [], []
        for video in videos:
            frames = [
                self.process_image(frame, options["do_convert_rgb"], input_data_format=options["input_data_format"])
                for frame in video
            ]
            check_frame_sizes({frame.shape[-2:] for frame in frames})
            if options["do_resize"]:
                sharing = sum(map(len, videos)) if options["video_shared_budget"] else len(frames)
                height, width = frames[0].shape[-2:]
                size = _frame_size(height, width, sharing, options)
                frames = [self._resize_to(frame, size, options["resample"]) for frame in frames]
            patches, grid = patchify(np.stack(frames), options["patch_size"], options["merge_size"])
            packed.append(patches)
            grids.append(grid)
        data = {
            "pixel_values_videos": _normalize(np.concatenate(packed), options["image_mean"], options["image_std"]),
            "video_grid_thw": np.array(grids, dtype=np.int64),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def get_video_grid_thw(self, num_frames: int, height: int, width: int, **kwargs: Any) -> tuple[int, int, int]:
        """Frames, rows and columns in patches that a video alone in a call is cut into.

        Args:
            num_frames: Number of frames.
            height: Height of a frame in pixels.
            width: Width of a frame in pixels.
            **kwargs: Options that replace the processor's own.
        """
        options = self._get_video_options(kwargs)
        if options["do_resize"]:
            height, width = _frame_size(height, width, num_frames, options)
        return num_frames, height // options["patch_size"], width // options["patch_size"]

    def _get_video_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        validate_typed_dict(self.valid_kwargs, kwargs)
        if kwargs.get("size") is not None:
            raise ValueError(
                f"`size` must not be given for videos, got {kwargs['size']}; use the options `video_*` instead."
            )
        for name in ("do_rescale", "do_normalize"):
            if kwargs.get(name) is False:
                raise ValueError(f"`{name}` must be True for videos, got False.")
        own = {name: getattr(self, name) for name in self._valid_kwargs_names}
        options: dict[str, Any] = {**own, **kwargs, "size": self.size, "do_rescale": True, "do_normalize": True}
        options = self._standardize_kwargs(**options)
        self._validate_preprocess_kwargs(**options)
        return options


def enlarge_tiny(height: int, width: int) -> tuple[int, int]:
    """Size of an image after the first step of openPangu-VL, which enlarges images with a side of at most 28 pixels.

    Args:
        height: Height in pixels.
        width: Width in pixels.

    Returns:
        Height and width: the shorter one 56, the longer one in proportion, rounded down; unchanged for other images.
    """
    if min(height, width) > TINY_SIDE:
        return height, width
    scale = TINY_SIDE_TARGET / min(height, width)
    if width >= height:
        return TINY_SIDE_TARGET, int(scale * width)
    return int(scale * height), TINY_SIDE_TARGET


def _frame_size(height: int, width: int, num_frames: int, options: dict[str, Any]) -> tuple[int, int]:
    """Height and width that a frame is resized to, if `num_frames` share the budget of pixels."""
    limits = get_frame_area_limits(
        num_frames,
        min_frame_pixels=options["video_min_frame_pixels"],
        max_frame_pixels=options["video_max_frame_pixels"],
        min_total_pixels=options["video_min_total_pixels"],
        max_total_pixels=options["video_max_total_pixels"],
        dynamic=options["video_dynamic_pixels"],
    )
    factor = options["patch_size"] * options["merge_size"]
    return smart_resize(height, width, factor, *limits, options["max_aspect_ratio"])


def _normalize(patches: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    return normalize_raw_pixels(torch.from_numpy(patches), mean, std, torch.float32).numpy()


__all__ = ["WindowFreeViTImageProcessor"]
