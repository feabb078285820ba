"""The frame of an image processor: what a model sees of an image, from the processor's settings."""

import sys
from dataclasses import dataclass
from typing import Any

from ..validation import check_size
from .maps import Frame

__all__ = ["Processed"]

Size = tuple[int, int]

_STANDARD = "transformers.image_processing_backends"  # the module of the steps that most image processors share


@dataclass(frozen=True)
class Processed:
    """Rule: the image as an image processor gives it to a model, resized, cropped and padded by its settings.

    It knows the processors of vlparts, those of transformers that resize, crop and pad in the common way (CLIP,
    SigLIP, ViT, DINOv2, BLIP, ...), and Siglip2's. Settings are read at each call. Of processors that cut an image
    into views, only `relative` numbers are known.

    Args:
        processor: An image processor, or a processor that has one as `image_processor`.
        relative: Return the unchanged image where the processor only resizes, for numbers relative to the image,
            which do not change then.
    """

    processor: Any
    relative: bool = False

    def __call__(self, image_size: Size) -> Frame:
        """Return the frame of an image of this (width, height).

        Raises:
            ValueError: If `image_size` is invalid, the processor refuses the size, or its steps are unknown.
        """
        size = check_size(image_size)
        processor = getattr(self.processor, "image_processor", self.processor)
        if hasattr(processor, "get_tile_grid") and not getattr(processor, "do_pad", False):
            if self.relative:
                return Frame.original(size)
            raise ValueError(
                f"The image processor {type(processor).__name__} cuts an image into views; its frame is unknown."
            )
        frame = _frame(processor, size)
        return Frame.original(size) if self.relative and frame == Frame.resized(size, frame.size) else frame


def _frame(processor: Any, size: Size) -> Frame:
    width, height = size
    if not getattr(processor, "do_resize", True):
        resized = size
    elif hasattr(processor, "get_grid_thw"):
        _, rows, columns = processor.get_grid_thw(height, width)
        return Frame.resized(size, (columns * processor.patch_size, rows * processor.patch_size))
    elif hasattr(processor, "max_num_patches"):
        rule = sys.modules[type(processor).__module__].get_image_size_for_max_num_patches
        new_height, new_width = rule(height, width, processor.patch_size, processor.max_num_patches)
        return Frame.resized(size, (new_width, new_height))
    else:
        resized = _resized_size(processor, size)
    frame = Frame.resized(size, resized)
    steps = [name for name in ("do_center_crop", "do_pad") if getattr(processor, name, None)]
    if steps:
        _require_standard(processor, "_preprocess", f"`{steps[0]}`")
    if "do_center_crop" in steps:
        crop = _side(processor.crop_size, "width"), _side(processor.crop_size, "height")
        window = [_start(old, new, processor) for old, new in zip(resized, crop, strict=True)]
        corners = (window[0], window[1], window[0] + crop[0], window[1] + crop[1])
        frame = frame.then(Frame.cropped(resized, corners))
    if "do_pad" in steps and processor.pad_size:  # without a size, to the largest image of a batch, right and below
        padded = _side(processor.pad_size, "width"), _side(processor.pad_size, "height")
        frame = frame.then(Frame.cropped(frame.size, (0, 0, *padded)))
    return frame


def _start(old: int, new: int, processor: Any) -> int:
    """First pixel of a centred window of `new` pixels; negative if padded, where the backends round differently."""
    if new > old and getattr(processor, "backend", "pil") == "torchvision":
        return -((new - old) // 2)
    return (old - new) // 2


def _resized_size(processor: Any, size: Size) -> Size:
    given = processor.size
    if given.get("height") and given.get("width"):
        return _side(given, "width"), _side(given, "height")
    if not given.get("shortest_edge") or given.get("longest_edge"):
        raise ValueError(
            f"The image processor {type(processor).__name__} has `size` {given}; expected height and width, or the "
            "shortest edge, so that its frame is known."
        )
    _require_standard(processor, "resize", "`shortest_edge`")
    short = given["shortest_edge"]
    long = int(short * max(size) / min(size))
    return (short, long) if size[0] <= size[1] else (long, short)


def _side(size: Any, name: str) -> int:
    return int(size[name])


def _require_standard(processor: Any, method: str, setting: str) -> None:
    """Raise ValueError if the class has a method of its own, whose result is unknown here."""
    if getattr(type(processor), method).__module__ != _STANDARD:
        raise ValueError(
            f"The image processor {type(processor).__name__} handles {setting} in its own way; its frame is unknown."
        )
