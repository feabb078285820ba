"""Images and videos as users nest them, in the order of their placeholders."""

from typing import Any

from transformers.image_utils import get_image_size, make_flat_list_of_images
from transformers.video_utils import is_valid_video

__all__ = ["flat_list_of_videos", "images_by_sample", "videos_by_sample"]


def images_by_sample(images: Any) -> list[list[Any]] | None:
    """The images of each sample where they are given as lists, otherwise None (one image, or a flat list)."""
    if not isinstance(images, (list, tuple)) or not any(isinstance(item, (list, tuple)) for item in images):
        return None
    return [make_flat_list_of_images(item) if item else [] for item in images]


def videos_by_sample(videos: Any) -> list[list[Any]] | None:
    """The videos of each sample where they are given as lists of videos, otherwise None (one, or a flat list)."""
    if not isinstance(videos, (list, tuple)):
        return None
    if any(not isinstance(item, (list, tuple)) or is_valid_video(item) for item in videos):
        return None
    return [flat_list_of_videos(item) for item in videos]


def flat_list_of_videos(videos: Any) -> list[Any]:
    """The videos of any nesting as one list.

    Args:
        videos: A video is a list of frames (images, all of one size) or an array with four axes; videos may stand
            alone, in lists, in lists of lists (one list for each sample), or be an array with five axes.

    Returns:
        The videos, each as it was given.

    Raises:
        ValueError: If something in it is no video (a path, for example: files are not decoded), or frames of a video
            differ in size.
    """
    if is_valid_video(videos):
        if isinstance(videos, (list, tuple)):
            _check_sizes(videos)
        return [videos]
    if isinstance(videos, (list, tuple)):
        return [video for item in videos for video in flat_list_of_videos(item)]
    if getattr(videos, "ndim", 0) == 5:
        return list(videos)
    raise ValueError(
        "`videos` must hold videos as lists of frames or as arrays with four axes, decoded already, got "
        f"{videos if isinstance(videos, str) else type(videos).__name__!r}."
    )


def _check_sizes(frames: Any) -> None:
    sizes = {frame.size[::-1] if hasattr(frame, "getbands") else get_image_size(frame) for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"`videos` must hold frames of one size in each video, got (height, width) {sorted(sizes)}.")
