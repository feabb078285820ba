"""Area limits of the frames of a video."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.parts.image_transforms import get_frame_area_limits

PUBLISHED = {
    "min_frame_pixels": 100352,
    "max_frame_pixels": 200704,
    "min_total_pixels": 100352,
    "max_total_pixels": 11239424,
}


@given(st.integers(1, 1000))
def test_published_limits_are_128_to_256_tokens_a_frame(num_frames: int) -> None:
    low, high = get_frame_area_limits(num_frames, **PUBLISHED)
    assert low == 128 * 28**2
    assert high == min(256 * 28**2, max(128 * 28**2, 11239424 // num_frames))


@given(
    st.integers(1, 500),
    st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
    st.tuples(st.integers(1, 10**8), st.integers(1, 10**8)),
)
def test_limits_stay_those_of_a_frame(num_frames: int, frame: tuple[int, int], total: tuple[int, int]) -> None:
    low, high = get_frame_area_limits(num_frames, min(frame), max(frame), min(total), max(total))
    assert min(frame) <= low <= high <= max(frame)
    assert high * num_frames <= max(total) or high == min(frame)
    fixed = get_frame_area_limits(num_frames, min(frame), max(frame), min(total), max(total), dynamic=False)
    assert fixed == (min(frame), max(frame))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "`num_frames` must be at least 1, got 0"),
        ({"min_frame_pixels": 300000}, r"got 300000\.\.200704 for a frame"),
        ({"max_total_pixels": 5}, r"100352\.\.5 in total"),
        ({"min_total_pixels": 0}, r"0\.\.11239424 in total"),
    ],
)
def test_impossible_limits_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_frame_area_limits(**{"num_frames": 8, **PUBLISHED, **changes})
