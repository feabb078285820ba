"""What holds for every region, image size, format and text."""

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.parts.coordinates import (
    PADDED,
    CoordinateError,
    CoordinateFormat,
    Region,
    box_iou,
    decode,
    decode_array,
    dequantize,
    encode,
    encode_array,
    quantize,
)

TAGGED = CoordinateFormat(label_open="<ref>", label_close="</ref>", separator=";")
BINS = CoordinateFormat(denominator=1000, rounding="floor", separator=" | ")
FORMATS = [
    PADDED,
    BINS,
    TAGGED,
    CoordinateFormat(levels=1024, digits=4, denominator=1023, separator=", "),
    CoordinateFormat(levels=2, digits=1, denominator=1),
    CoordinateFormat(denominator=1000, label_close=": "),
]
formats = st.sampled_from(FORMATS)
sides = st.integers(1, 20_000) | st.sampled_from([1, 2, 3, 997, 999, 1000, 1001, 1998, 4096])
sizes = st.tuples(sides, sides)
unit = st.floats(0, 1)
# Characters of the grammar, their look-alikes, and others.
hostile = st.text(st.sampled_from("(),0123456789 \n;-.a<ref>/\uff08\uff09\uff0c\uff11\u0661\u3001\u2028"), max_size=60)
unlabelled = st.none()
labels = st.none() | hostile | st.text(max_size=12)


@st.composite
def region_lists(draw: st.DrawFn, label: st.SearchStrategy[Any] = unlabelled) -> tuple[list[Region], Any]:
    """An image size and regions inside the image."""
    width, height = draw(sizes)
    regions = []
    for _ in range(draw(st.integers(0, 5))):
        xs = sorted(min(draw(unit) * width, width) for _ in range(2))
        ys = sorted(min(draw(unit) * height, height) for _ in range(2))
        if draw(st.booleans()):
            regions.append(Region.box(xs[0], ys[0], xs[1], ys[1], draw(label)))
        else:
            regions.append(Region.point(xs[0], ys[0], draw(label)))
    return regions, (width, height)


def quantum(fmt: CoordinateFormat, side: int) -> float:
    """The documented bound of the error on one side, in pixels."""
    at_the_edge = fmt.rounding == "round" and fmt.denominator >= fmt.levels
    return side / fmt.denominator * (1.0 if at_the_edge else 0.5) * (1 + 1e-9)


@given(side=sides, fmt=formats)
def test_codes_survive(side: int, fmt: CoordinateFormat) -> None:
    codes = np.arange(fmt.levels)
    pixels = dequantize(codes, side, fmt)
    assert (pixels >= 0).all()
    assert (pixels <= side).all()
    np.testing.assert_array_equal(quantize(pixels, side, fmt), codes)


@given(side=sides, fmt=formats, values=st.lists(unit, min_size=2, max_size=20))
def test_pixels_move_by_half_a_step_at_most_and_keep_their_order(
    side: int, fmt: CoordinateFormat, values: list[float]
) -> None:
    pixels = np.sort(np.minimum(np.array(values) * side, side))
    codes = quantize(pixels, side, fmt)
    assert (np.diff(codes) >= 0).all()
    assert (np.abs(dequantize(codes, side, fmt) - pixels) <= quantum(fmt, side)).all()


@given(drawn=region_lists(), fmt=formats)
def test_regions_come_back_close_and_in_order(
    drawn: tuple[list[Region], tuple[int, int]], fmt: CoordinateFormat
) -> None:
    regions, size = drawn
    text = encode(regions, size, fmt)
    result = decode(text, size, fmt)
    assert [region.kind for region in result.regions] == [region.kind for region in regions]
    for got, region in zip(result.regions, regions, strict=True):
        distance = np.abs(np.array(got.points) - np.array(region.points))
        assert (distance <= [quantum(fmt, side) for side in size]).all()
    assert encode(result.regions, size, fmt) == text


@given(drawn=region_lists(labels), fmt=formats)
def test_a_label_comes_back_or_is_refused(drawn: tuple[list[Region], tuple[int, int]], fmt: CoordinateFormat) -> None:
    regions, size = drawn
    try:
        text = encode(regions, size, fmt)
    except CoordinateError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert any(region.label is not None for region in regions)
        assert "might be read back as" in refused
        return
    result = decode(text, size, fmt)
    assert [region.label for region in result.regions] == [region.label for region in regions]
    assert [region.kind for region in result.regions] == [region.kind for region in regions]
    assert encode(result.regions, size, fmt) == text


@given(text=hostile | st.text(), fmt=formats, size=sizes)
def test_any_text_gives_regions_or_the_error(text: str, fmt: CoordinateFormat, size: tuple[int, int]) -> None:
    collected = decode(text, size, fmt, on_error="collect")
    assert decode(text, size, fmt, on_error="skip").regions == collected.regions
    positions = [error.position for error in collected.errors]
    assert positions == sorted(set(positions))
    assert all(text[position] in "(\uff08" for position in positions)
    if positions:
        with pytest.raises(CoordinateError) as caught:
            decode(text, size, fmt)
        assert caught.value.position == positions[0]
    else:
        assert decode(text, size, fmt) == collected


@given(text=hostile, fmt=formats, size=sizes)
def test_spans_hold_the_regions(text: str, fmt: CoordinateFormat, size: tuple[int, int]) -> None:
    text = f"{text} (000,000) {text}{fmt.separator}(0,0)\n(001,001),(001,001)"
    result = decode(text, size, fmt, on_error="collect")
    assert list(result.spans) == sorted(result.spans)
    for region, (start, end) in zip(result.regions, result.spans, strict=True):
        (alone,) = decode(text[start:end], size, fmt).regions
        assert (alone.kind, alone.points) == (region.kind, region.points)


@given(
    drawn=region_lists(st.none() | st.just("cat")),
    # A cut after the comma of a separator ", " cannot be told from a cut inside a box.
    fmt=st.sampled_from([fmt for fmt in FORMATS if not fmt.separator.startswith(",")]),
    data=st.data(),
)
def test_a_cut_text_gives_the_regions_before_the_cut(
    drawn: tuple[list[Region], tuple[int, int]], fmt: CoordinateFormat, data: st.DataObject
) -> None:
    regions, size = drawn
    text = encode(regions, size, fmt)
    whole = decode(text, size, fmt)
    cut = data.draw(st.integers(0, len(text)))
    result = decode(text[:cut], size, fmt, on_error="collect")
    done = sum(end <= cut for _, end in whole.spans)
    assert result.regions[:done] == whole.regions[:done]
    begun = [(start, end) for start, end in whole.spans if start < cut < end]
    half = [cut == start + (end - start) // 2 for start, end in begun if "),(" in text[start:end]]
    if any(half):  # a box cut exactly after its first pair reads as a point, as documented
        assert [region.kind for region in result.regions[done:]] == ["point"]
        assert result.errors == ()
    else:
        assert len(result.regions) == done
        assert [error.position for error in result.errors] == [start for start, _ in begun]


@given(drawn=region_lists(), fmt=formats)
def test_one_by_one_equals_together(drawn: tuple[list[Region], tuple[int, int]], fmt: CoordinateFormat) -> None:
    regions, size = drawn
    assert encode(regions, size, fmt) == fmt.separator.join(encode([region], size, fmt) for region in regions)
    boxes = [region.xyxy for region in regions if region.kind == "box"]
    texts = [encode([Region.box(*box)], size, fmt) for box in boxes]
    assert encode_array(boxes, size, fmt) == texts
    expected = [list(decode(text, size, fmt).regions[0].xyxy) for text in texts]
    assert decode_array(texts, size, fmt).tolist() == expected


@given(drawn=region_lists(), fmt=formats, shift=st.floats(-1e6, 1e6))
def test_clamp_and_skip_need_no_more_room(
    drawn: tuple[list[Region], tuple[int, int]], fmt: CoordinateFormat, shift: float
) -> None:
    regions, size = drawn
    moved = [Region(region.kind, tuple((x + shift, y) for x, y in region.points)) for region in regions]
    inside = [region for region in moved if region.xyxy[0] >= 0 and region.xyxy[2] <= size[0]]
    assert encode(moved, size, fmt, on_outside="skip") == encode(inside, size, fmt)
    clamped = decode(encode(moved, size, fmt, on_outside="clamp"), size, fmt).regions
    for got, region in zip(clamped, moved, strict=True):
        expected = np.clip(np.array(region.points), 0, size)
        assert (np.abs(np.array(got.points) - expected) <= [quantum(fmt, side) for side in size]).all()
    if len(inside) < len(moved):
        with pytest.raises(CoordinateError, match="leaves the image"):
            encode(moved, size, fmt)


@given(drawn=region_lists(), first=st.sampled_from(FORMATS[:3]), second=st.sampled_from(FORMATS[:3]))
def test_from_one_format_to_another_and_back(
    drawn: tuple[list[Region], tuple[int, int]], first: CoordinateFormat, second: CoordinateFormat
) -> None:
    regions, size = drawn
    start = decode(encode(regions, size, first), size, first).regions
    there = decode(encode(start, size, second), size, second).regions
    back = decode(encode(there, size, first), size, first).regions
    for got, region in zip(back, start, strict=True):
        room = [quantum(first, side) + quantum(second, side) for side in size]
        assert (np.abs(np.array(got.points) - np.array(region.points)) <= room).all()


@given(drawn=region_lists(), fmt=formats)
def test_inputs_are_left_alone(drawn: tuple[list[Region], tuple[int, int]], fmt: CoordinateFormat) -> None:
    regions, size = drawn
    kept = copy.deepcopy(regions)
    boxes = np.array([region.xyxy for region in regions], dtype=np.float64).reshape(-1, 4)
    before = boxes.copy()
    boxes.flags.writeable = False
    encode(regions, size, fmt, on_outside="clamp")
    codes = quantize(boxes.reshape(-1, 2, 2), size, fmt)
    codes.flags.writeable = False
    dequantize(codes, size, fmt)
    decode_array(encode_array(boxes, size, fmt), size, fmt)
    box_iou(boxes, boxes)
    assert regions == kept
    np.testing.assert_array_equal(boxes, before)


@given(drawn=region_lists())
def test_iou_is_symmetric_bounded_and_one_with_itself(drawn: tuple[list[Region], tuple[int, int]]) -> None:
    boxes = np.array([region.xyxy for region in drawn[0]]).reshape(-1, 4)
    iou = box_iou(boxes, boxes)
    np.testing.assert_allclose(iou, iou.T, rtol=1e-12)
    assert ((iou >= 0) & (iou <= 1 + 1e-12)).all()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    np.testing.assert_array_equal(np.diag(iou), (area > 0).astype(float))
