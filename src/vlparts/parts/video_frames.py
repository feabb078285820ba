"""How large a frame of a video may be."""


def get_frame_area_limits(
    num_frames: int,
    min_frame_pixels: int,
    max_frame_pixels: int,
    min_total_pixels: int,
    max_total_pixels: int,
    dynamic: bool = True,
) -> tuple[int, int]:
    """Share out the pixel budget of a call over its frames, as openPangu-VL's video processor does.

    Args:
        num_frames: Frames of all videos of the call together.
        min_frame_pixels: Smallest area of a frame, whatever the budget.
        max_frame_pixels: Largest area of a frame, whatever the budget.
        min_total_pixels: Area that all frames together should have at least.
        max_total_pixels: Area that all frames together should have at most.
        dynamic: False: the limits of a frame alone count.

    Returns:
        Smallest and largest area of one frame in pixels.

    Raises:
        ValueError: If a limit or `num_frames` is not positive, or a smallest area is above the largest.
    """
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
    for low, high in ((min_frame_pixels, max_frame_pixels), (min_total_pixels, max_total_pixels)):
        if not 0 < low <= high:
            raise ValueError(
                "Pixel limits must be positive and the smallest at most the largest, got "
                f"{min_frame_pixels}..{max_frame_pixels} for a frame and {min_total_pixels}..{max_total_pixels} "
                "in total."
            )
    if not dynamic:
        return min_frame_pixels, max_frame_pixels
    low, high = (
        max(min(total // num_frames, max_frame_pixels), min_frame_pixels)
        for total in (min_total_pixels, max_total_pixels)
    )
    return low, high
