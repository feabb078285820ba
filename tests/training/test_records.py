"""Records: an invalid line is reported with its file, number and reason, or skipped and listed."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.regions import Region
from vlparts.training.records import ImageBlock, RecordError, RegionBlock, TextBlock, read_records

QUESTION = {"role": "user", "content": "Where is the cat?"}
ANSWER = {"role": "assistant", "content": {"label": "cat", "box": [1, 2, 3, 4]}}
GOOD = {"image": "a.png", "messages": [QUESTION, ANSWER]}


def answered(content: Any, **fields: Any) -> dict[str, Any]:
    return {"image": "a.png", "messages": [QUESTION, {"role": "assistant", "content": content}], **fields}


def asked(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ANSWER], **fields}


BROKEN: dict[str, tuple[Any, str]] = {
    "not JSON": ('{"image": ', "Not valid JSON"),
    "a list": ([GOOD], "Expected a JSON object, got list"),
    "a number": (3, "Expected a JSON object, got int"),
    "null": (None, "Expected a JSON object, got NoneType"),
    "unknown key": ({**GOOD, "picture": "a.png"}, "picture: Extra inputs are not permitted"),
    "key given twice": ('{"messages": [], "messages": []}', "Key 'messages' occurs twice"),
    "NaN": ('{"image": NaN}', "NaN is not a valid number"),
    "Infinity": ('{"image": Infinity}', "Infinity is not a valid number"),
    "minus Infinity": ('{"image": -Infinity}', "-Infinity is not a valid number"),
    "nested too deeply": ("[" * 100_000, "nested too deeply"),
    "a lone surrogate": (answered("\ud800"), "half of a surrogate pair"),
    "x2 < x1": (answered({"box": [3, 2, 1, 4]}), "messages.1.content.0: `x2` (1) is less than `x1` (3)"),
    "y2 < y1": (answered({"box": [1, 4, 3, 2]}), "messages.1.content.0: `y2` (2) is less than `y1` (4)"),
    "three numbers": (answered({"box": [1, 2, 3]}), "messages.1.content.0.box.3: Field required"),
    "five numbers": (answered({"box": [1, 2, 3, 4, 5]}), "at most 4 items"),
    "NaN in a box": (
        '{"messages": [{"role": "assistant", "content": {"box": [NaN, 0, 1, 1]}}]}',
        "NaN is not a valid number",
    ),
    "number beyond floats": (answered({"box": [0, 0, 10**400, 1]}), "messages.1.content.0.box.2: "),
    "exponent beyond floats": (
        json.dumps(answered({"box": [0, 0, 7, 1]})).replace("7", "1e999"),
        "Number 1e999 is too large",
    ),
    "number with too many digits": (
        json.dumps(answered({"box": [0, 0, 7, 1]})).replace("7", "7" * 5000),
        "A number has 5000 digits, more than 4300",
    ),
    "text in a box": (answered({"box": ["1", 2, 3, 4]}), "messages.1.content.0.box.0: Input should be a valid number"),
    "a bool in a box": (answered({"box": [True, 2, 3, 4]}), "messages.1.content.0.box.0: Input should be a valid num"),
    "point of three": (answered({"point": [1, 2, 3]}), "messages.1.content.0.point: Tuple should have at most 2"),
    "box and point": (answered({"box": [1, 2, 3, 4], "point": [1, 2]}), "A region must have either 'box' or 'point'"),
    "label alone": (answered({"label": "cat"}), "A region must have either 'box' or 'point'"),
    "unknown key in a region": (answered({"box": [1, 2, 3, 4], "score": 1}), "content.0.score: Extra inputs"),
    "unknown block": (answered({"video": "a.mp4"}), "messages.1.content.0.text: Field required"),
    "number as content": (answered(5), "Expected a text, an image, a box or a point, got 5."),
    "null as content": (answered(None), "Expected a text, an image, a box or a point, got None."),
    "list in a list": (answered([["cat"]]), "Expected a text, an image, a box or a point, got ['cat']."),
    "image and images": ({**GOOD, "images": ["b.png"]}, "A record must have either 'image' or 'images', got both."),
    "number as image": ({**GOOD, "image": 5}, "image: Input should be a valid string"),
    "one text as images": (
        {"images": "a.png", "messages": [QUESTION, ANSWER]},
        "images: Input should be a valid tuple",
    ),
    "no messages": ({"image": "a.png"}, "messages: Field required"),
    "empty messages": ({"messages": []}, "messages: Tuple should have at least 1 item"),
    "no assistant turn": ({"messages": [QUESTION]}, "A record must have an assistant turn, got none."),
    "wrong role": ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role: Input should be 'system'"),
    "region in no image": (
        answered({"box": [1, 2, 3, 4], "image": 1}),
        "image 1, but the record has 1 images.",
    ),
    "region without an image": ({"messages": [QUESTION, ANSWER]}, "refers to image 0, but the record has 0 images."),
    "negative image": (answered({"box": [1, 2, 3, 4], "image": -1}), "content.0.image: Input should be greater"),
    "text as image index": (answered({"box": [1, 2, 3, 4], "image": "0"}), "content.0.image: Input should be a valid"),
    "bool as image index": (answered({"box": [1, 2, 3, 4], "image": False}), "content.0.image: Input should be a"),
    "too many places": (
        asked([{"type": "image"}] * 2, image="a.png"),
        "2 image blocks for 1 images; expected 0 or 1",
    ),
    "too few places": (
        asked([{"type": "image"}], images=["a.png", "b.png"]),
        "1 image blocks for 2 images",
    ),
    "place without an image": (
        {"messages": [{"role": "assistant", "content": {"type": "image"}}]},
        "1 image blocks for 0 images; expected 0 or 0.",
    ),
    "image without a user turn": (
        {"image": "a.png", "messages": [ANSWER]},
        "no user turn to place its images in",
    ),
}


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_named_with_file_line_and_reason(tmp_path: Path, name: str) -> None:
    line, reason = BROKEN[name]
    path = write(tmp_path / "train.jsonl", GOOD, "", "null" if line is None else line, GOOD)
    with pytest.raises(RecordError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_can_be_skipped(tmp_path: Path, name: str) -> None:
    line, reason = BROKEN[name]
    path = write(tmp_path / "train.jsonl", GOOD, "null" if line is None else line, GOOD)
    found = read_records(path, on_error="skip")
    assert [line.number for line in found.lines] == [1, 3]
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith(f"{path}, line 2: ")
    assert reason in found.skipped[0]


def test_reasons_are_one_line(tmp_path: Path) -> None:
    lines = ["null" if line is None else line for line, _ in BROKEN.values()]
    found = read_records(write(tmp_path / "train.jsonl", GOOD, *lines), on_error="skip")
    assert len(found.skipped) == len(BROKEN)
    assert all("\n" not in reason for reason in found.skipped)


@pytest.mark.parametrize("depth", [100, 900, 990, 2000, 20_000])
def test_no_nesting_depth_raises_another_error(tmp_path: Path, depth: int) -> None:
    nested = json.dumps(answered(["deep", "\ud800"])).replace('"deep"', "[" * depth + "]" * depth)
    found = read_records(write(tmp_path / "train.jsonl", GOOD, nested), on_error="skip")
    assert len(found.skipped) == 1
    assert len(found.skipped[0]) < 1000


def test_bytes_that_are_not_utf8_are_an_invalid_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"image": "\xff\xfe"}\n' + json.dumps(GOOD).encode())
    with pytest.raises(RecordError, match="line 2: Not valid UTF-8"):
        read_records(path)
    found = read_records(path, on_error="skip")
    assert [line.number for line in found.lines] == [1, 3]


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode() + b"\r\n")
    assert [line.number for line in read_records(path).lines] == [1, 2]


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str, on_error: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecordError, match=r"train\.jsonl: expected at least one valid record, got none \(0 sk"):
        read_records(path, on_error)


def test_a_file_of_broken_lines_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", "{", "[]")
    with pytest.raises(RecordError, match=r"got none \(2 skipped\)\. First skipped: .*line 1: Not valid JSON"):
        read_records(path, on_error="skip")


@pytest.mark.parametrize("missing", ["nothing.jsonl", "."])
def test_a_missing_file_is_an_error(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match="`data` must be a JSON Lines file, got .*, which is not a file"):
        read_records(tmp_path / missing)


def test_an_unknown_policy_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`on_error` must be 'raise' or 'skip', got 'warn'"):
        read_records(write(tmp_path / "train.jsonl", GOOD), on_error="warn")


def test_every_form_of_a_good_record(tmp_path: Path) -> None:
    contents = ["a", {"type": "text", "text": "a"}, ["a", {"point": [1, 2.5]}, {"label": "b", "box": [0, 0, 0, 0]}]]
    path = write(
        tmp_path / "train.jsonl",
        *[answered(content) for content in contents],
        asked(["Here ", {"type": "image"}, {"type": "image"}], images=["a.png", "b.png"]),
        {"messages": [{"role": "system", "content": "s"}, QUESTION, {"role": "assistant", "content": []}]},
    )
    first, second, mixed, placed, words = [line.record for line in read_records(path).lines]
    assert first.messages[1].content == second.messages[1].content == (TextBlock(text="a"),)
    text, point, box = mixed.messages[1].content
    assert text == TextBlock(text="a")
    assert isinstance(point, RegionBlock)
    assert point.region().points == ((1.0, 2.5),)
    assert isinstance(box, RegionBlock)
    assert (box.region().xyxy, box.label) == ((0.0, 0.0, 0.0, 0.0), "b")
    assert placed.all_images == ("a.png", "b.png")
    assert placed.messages[0].content[1:] == (ImageBlock(), ImageBlock())
    assert words.all_images == ()
    assert words.messages[2].content == ()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
blocks = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image", "box", None]),
        "text": json_values,
        "label": json_values,
        "box": st.lists(st.integers() | st.floats() | st.booleans(), max_size=5) | json_values,
        "point": st.lists(st.integers() | st.floats(), max_size=3) | json_values,
        "image": st.integers() | json_values,
    },
)
nearly_records = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["system", "user", "assistant", "tool"]),
                    "content": blocks | st.lists(blocks | json_values, max_size=4) | json_values,
                }
            ),
            max_size=4,
        )
        | json_values
    },
    optional={"image": st.text() | json_values, "images": st.lists(st.text(), max_size=3), "other": json_values},
)


@given(lines=st.lists(st.binary(max_size=40) | (nearly_records | json_values).map(json.dumps), max_size=5))
def test_no_line_raises_anything_but_a_record_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes | str]
) -> None:
    path = tmp_path_factory.mktemp("lines") / "train.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    broken: list[str] = []
    try:
        broken = read_records(path, on_error="skip").skipped
    except RecordError as error:
        broken = [str(error)]
    if broken:
        with pytest.raises(RecordError):
            read_records(path)
    else:
        read_records(path)


def test_the_attributes_of_a_region_are_kept() -> None:
    block = RegionBlock(box=(1, 2, 3, 4), label="a", attributes={"text": "b", "n": [1, None]})
    assert block.region() == Region.box(1, 2, 3, 4, "a", attributes={"text": "b", "n": [1, None]})
    with pytest.raises(ValueError, match=r"`attributes\['n'\]` must be a JSON value"):
        RegionBlock(point=(1, 2), attributes={"n": float("nan")})
