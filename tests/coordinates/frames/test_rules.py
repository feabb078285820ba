"""Frame rules: data, cached frames, and the sizes of the models' own resizing."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_utils import SizeDict
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vlparts.coordinates.frames.maps import Frame
from vlparts.coordinates.frames.rules import FitWithin, FrameRule, Original, PaddedSquare, Resized, SmartResize

sides = st.integers(1, 100_000)
sizes = st.tuples(sides, sides)
small = st.integers(1, 2000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PaddedSquare("middle"), "`offset` must be one of"),
        (lambda: Resized((1, 2, 3)), "^`size` must be"),  # type: ignore[arg-type]
        (lambda: SmartResize(factor=0), "`factor` must be an integer of at least 1, got 0"),
        (lambda: SmartResize(min_pixels=5, max_pixels=4), r"`max_pixels` must be at least `min_pixels` \(5\), got 4"),
        (lambda: SmartResize()((10, 2001)), r"`image_size` \(10, 2001\) is too thin"),
        (lambda: SmartResize()((0, 10)), "`image_size` must be"),
        (lambda: FitWithin((10, 10))((1, 1000)), "too thin: its size within"),
    ],
)
def test_invalid_arguments_raise(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


RULES: list[FrameRule] = [Original(), Resized((8, 9)), PaddedSquare(), FitWithin((8, 9)), SmartResize()]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rules_are_data(rule: FrameRule) -> None:
    again = dataclasses.replace(rule)  # type: ignore[type-var]
    assert (again, hash(again), repr(again)) == (rule, hash(rule), repr(rule))
    assert repr(rule).startswith(type(rule).__name__ + "(")
    assert rule((640, 480)).image_size == (640, 480)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_cache_of_a_rule_accepts_no_invalid_size(rule: FrameRule) -> None:
    assert rule((1, 480 // 480)) == rule((np.int64(1), 1)) == rule([1, 1])  # type: ignore[arg-type]
    for wrong in [(True, 1), (1.0, 1), (1,), (1, [1]), None]:
        with pytest.raises(ValueError, match="`image_size` must be"):
            rule(wrong)  # type: ignore[arg-type]


@given(sizes, st.sampled_from([14, 28, 32]), st.integers(1, 3_000_000), st.integers(0, 20_000_000))
def test_smart_resize_is_that_of_transformers(size: tuple[int, int], factor: int, least: int, more: int) -> None:
    rule = SmartResize(factor, least, least + more)
    try:
        height, width = smart_resize(size[1], size[0], factor, least, least + more)
    except ValueError:
        with pytest.raises(ValueError, match="too thin"):
            rule(size)
        return
    assert rule(size).size == (width, height)


def of_qwen_utils(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The rule of qwen-vl-utils 0.0.14, written down plainly."""
    new = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if new[0] * new[1] > most:
        beta = math.sqrt(height * width / most)
        return math.floor(height / beta / factor) * factor, math.floor(width / beta / factor) * factor
    if new[0] * new[1] < least:
        beta = math.sqrt(least / (height * width))
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new[0], new[1]


@given(st.tuples(small, small), st.sampled_from([28, 32]), st.integers(1, 50_000), st.integers(0, 2_000_000))
def test_the_other_smart_resize(size: tuple[int, int], factor: int, least: int, more: int) -> None:
    rule = SmartResize(factor, least, least + more, floor_to_factor=False)
    height, width = of_qwen_utils(size[1], size[0], factor, least, least + more)
    if max(size) / min(size) > 200 or min(height, width) < 1:
        with pytest.raises(ValueError, match="too thin"):
            rule(size)
    else:
        assert rule(size).size == (width, height)


def test_the_variants_differ_for_thin_images() -> None:
    assert SmartResize()((1000, 10)).size == (560, 28)
    assert SmartResize(floor_to_factor=False)((1000, 10)).size == (1008, 28)


def test_fitting_keeps_small_images() -> None:
    rule = FitWithin((1920, 1080), padded=True)
    assert rule((640, 480)) == Frame((640, 480), (1920, 1080))
    frame = rule((3840, 1080))
    assert (frame.size, frame.scale) == ((1920, 1080), (Fraction(1, 2), Fraction(1, 2)))
    assert FitWithin((1920, 1080))((3840, 1080)).size == (1920, 540)


@given(st.tuples(st.integers(10, 90), st.integers(10, 90)), st.tuples(st.integers(10, 60), st.integers(10, 60)))
def test_fitting_is_that_of_fuyu(size: tuple[int, int], room: tuple[int, int]) -> None:
    image = np.zeros((3, size[1], size[0]), dtype=np.uint8)
    fitted = FuyuImageProcessorPil().resize(image, SizeDict(width=room[0], height=room[1]))
    assert FitWithin(room)(size).size == fitted.shape[:0:-1]
