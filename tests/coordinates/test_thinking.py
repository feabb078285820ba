"""Reasoning left out: by every reader alike, in whole texts and in chunks."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates import convert
from vlparts.coordinates.checking import check_text
from vlparts.coordinates.codec import CoordinateError, decode
from vlparts.coordinates.regions import Region
from vlparts.coordinates.streaming import StreamDecoder
from vlparts.coordinates.thinking import THINKING_MARKERS, ThinkingFilter, without_thinking
from vlparts.parts.thinking import THINKING_END, THINKING_START, split_thinking

SIZE = (999, 999)
MARKERS = [marker for pair in THINKING_MARKERS for marker in pair]
CAT = Region.box(5, 6, 7, 8, "cat")
THOUGHT = "<think>maybe cat (001,002),(003,004)</think>cat (005,006),(007,008)"
PIECES = [*MARKERS, "<thi", "nk>", "[unused1", "</", "cat (001,002),(003,004)", "\n", "(005,", "006)", " x ", "(1,2)"]


def cut(text: str, places: list[int]) -> list[str]:
    """The text in chunks that end at these places."""
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize("markers", THINKING_MARKERS)
@given(st.lists(st.integers(0, 3), max_size=8))
def test_thinking_is_that_of_split_thinking(markers: tuple[str, str], choices: list[int]) -> None:
    start, end = markers
    text = "".join([start, end, "ab", "c"][choice] for choice in choices)
    answer = without_thinking(text)
    assert len(answer) == len(text)
    assert answer.replace("\n", "") == split_thinking(text, start=start, end=end).answer


def test_the_markers_are_those_of_openpangu() -> None:
    assert (THINKING_START, THINKING_END) in THINKING_MARKERS


def test_a_block_ends_with_the_end_of_its_own_pair() -> None:
    text = "[unused16]a</think>b[unused17]c<think>d[unused17]e</think>f[unused17]g"
    assert without_thinking(text).replace("\n", "") == "cfg"


texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@given(texts, st.lists(st.integers(0, 300), max_size=12))
def test_chunks_give_what_the_whole_gives(text: str, places: list[int]) -> None:
    thinking, stream, regions, seen = ThinkingFilter(), StreamDecoder(SIZE, skip_thinking=True), [], ""
    for chunk in cut(text, places):
        seen += thinking.feed(chunk)
        regions += stream.feed(chunk)
        assert without_thinking(text).startswith(seen)
    regions += stream.close()
    assert seen + thinking.close() == without_thinking(text)
    whole = decode(text, SIZE, on_error="collect", skip_thinking=True)
    assert (tuple(regions), stream.errors) == (whole.regions, whole.errors)


def test_a_region_of_a_stream_comes_as_soon_as_it_is_certain() -> None:
    stream = StreamDecoder(SIZE, skip_thinking=True)
    assert stream.feed("maybe cat (001,002),(003,004) or (009,009) ") == []  # the prompt may have opened the reasoning
    assert stream.feed("</think>cat (005,006),(007,008) ") == []
    assert stream.feed("and") == [CAT]
    assert stream.close() == []
    stream = StreamDecoder(SIZE, skip_thinking=True)
    assert stream.feed("cat (005,006),(007,008) and") == []
    assert stream.feed("<thi") == []
    assert stream.feed("nk>") == [CAT]
    assert stream.feed("dog (001,002),(003,004) and") == []
    assert stream.close() == []
    stream = StreamDecoder(SIZE, skip_thinking=True)
    assert stream.feed("cat (005,006),(007,008) and") == []
    assert stream.close() == [CAT]


def test_problems_of_the_answer_alone() -> None:
    broken = THOUGHT.replace("(003,004)", "(3,4)")
    assert [problem.name for problem in check_text(broken, SIZE)] == ["unreadable"]
    assert check_text(broken, SIZE, skip_thinking=True) == []
    (problem,) = check_text(THOUGHT.replace("(007,008)", "(7,8)"), SIZE, skip_thinking=True)
    assert problem.detail.startswith(f"position {THOUGHT.index('(005')}: ")


def test_reasoning_is_not_converted() -> None:
    converted = convert(THOUGHT, None, "qwen2_vl", (1000, 1000), skip_thinking=True)
    reasoning, answer = THOUGHT.split("</think>")
    assert converted == f"{reasoning}</think>{convert(answer, None, 'qwen2_vl', (1000, 1000))}"
    assert converted != convert(THOUGHT, None, "qwen2_vl", (1000, 1000))
    broken = THOUGHT.replace("(003,004)", "(3,4)")
    with pytest.raises(CoordinateError):
        convert(broken, None, "qwen2_vl", (1000, 1000))
    assert convert(broken, None, "qwen2_vl", (1000, 1000), skip_thinking=True).startswith(broken.split("</think>")[0])


@given(texts)
def test_conversion_keeps_reasoning(text: str) -> None:
    """To openPangu's own format, which writes each region of a run on a line of its own."""
    converted = convert(text, None, None, SIZE, on_error="keep", skip_thinking=True)
    assert without_thinking(converted) == convert(without_thinking(text), None, None, SIZE, on_error="keep")


@pytest.mark.parametrize("policy", ["raise", "keep"])
def test_reasoning_within_a_list_is_not_lost(policy: str) -> None:
    first, second = '{"bbox_2d": [1, 2, 3, 4]}', '{"bbox_2d": [5, 6, 7, 8]}'
    text = f"[{first}, <think>hm</think>{second}]"
    options: dict[str, Any] = {"on_error": policy, "skip_thinking": True}
    if policy == "keep":
        assert convert(text, "qwen3_vl", "qwen2_vl", (1000, 1000), **options) == text
        return
    with pytest.raises(CoordinateError, match="Position 0: reasoning between regions would be lost"):
        convert(text, "qwen3_vl", "qwen2_vl", (1000, 1000), **options)
