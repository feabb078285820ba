"""The coordinate commands: output, reports and errors."""

import builtins
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from tests.tiny import picture
from vlparts.cli.coordinates import app
from vlparts.cli.jsonl import map_texts
from vlparts.coordinates.formats import published as table
from vlparts.coordinates.formats import registry as formats
from vlparts.coordinates.formats.openpangu import padded_format

TENS = padded_format("tens", levels=11, digits=2, denominator=10, label_open="<", label_close=">")
ROW = {"id": 1, "text": "see cat (000,500),(999,999).", "width": 100, "height": 200, "größe": "groß"}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table.__all__  # importing it makes the published formats known
    monkeypatch.setitem(formats._formats, "tens", TENS)


def run(*arguments: Any, **options: Any) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], **options)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def said(result: Result) -> str:
    """The message as one line."""
    return " ".join(result.stderr.split())


def write(path: Path, *given: Any) -> Path:
    path.write_text(lines(*given), encoding="utf-8")
    return path


CONVERT = ("convert", "--from", "openpangu", "--to", "tens")


def test_convert_from_input_to_output() -> None:
    result = run(*CONVERT, "-", input=lines(ROW, {**ROW, "text": "nothing"}))
    assert result.exit_code == 0
    assert rows(result.stdout) == [{**ROW, "text": "<see cat>(00,05),(10,10)."}, {**ROW, "text": "nothing"}]
    assert "gr\\u00f6\\u00dfe" in result.stdout  # as it came
    assert result.stderr == "2 lines converted.\n"


def test_convert_files_and_fields(tmp_path: Path) -> None:
    row = {"answer": "(000,500)", "w": 100, "h": 200}
    source, target = write(tmp_path / "a.jsonl", row), tmp_path / "b.jsonl"
    fields = ("--text-field", "answer", "--width-field", "w", "--height-field", "h")
    result = run(*CONVERT, source, "-o", target, *fields)
    assert (result.exit_code, result.stdout) == (0, "")
    assert rows(target.read_text(encoding="utf-8")) == [{**row, "answer": "(00,05)"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_convert_messages() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "(000,500)"}]
    messages = [{"role": "user", "content": content}, {"from": "gpt", "value": "(999,000)"}]
    result = run(*CONVERT, "-", "--text-field", "messages", input=lines({**ROW, "messages": messages}))
    (got,) = rows(result.stdout)
    assert got["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "(00,05)"}]
    assert got["messages"][1] == {"from": "gpt", "value": "(10,00)"}
    with pytest.raises(ValueError, match="Expected a text or a list of messages, got 3"):
        map_texts(3, str)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + lines(ROW, ROW).encode()
    assert run(*CONVERT, "-", input=content).exit_code == 0
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    result = run(*CONVERT, path)
    assert result.exit_code == 0
    assert len(rows(result.stdout)) == 2


def test_text_that_a_conversion_would_lose() -> None:
    row = {"width": 10, "height": 10, "text": '[{"bbox_2d":[1,2,3,4],"text_content":"ACME"}]'}
    command = ("convert", "--from", "qwen3_vl", "--to", "openpangu", "-")
    result = run(*command, input=lines(row))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "line 1: Position 22: key 'text_content' would be lost" in said(result)
    result = run(*command, "--on-error", "collect", input=lines(row))
    assert result.exit_code == 0
    (kept,) = rows(result.stdout)
    assert kept["text"] == row["text"]
    assert "'text_content' would be lost" in kept["convert_error"]
    result = run("convert", "--from", "qwen3_vl", "--to", "gemini", "-", input=lines(row))
    assert rows(result.stdout)[0]["text"] == '[\n  {"box_2d": [2, 1, 4, 3], "text_content": "ACME"}\n]'
    other = {**row, "text": '[{"bbox_2d":[1,2,3,4],"width":7}]'}
    result = run("check", "-", "--text-field", "text", "--format", "qwen3_vl", input=lines(row, other))
    assert result.exit_code == 1
    assert "1 lost: text beside coordinates" in result.stdout
    assert "'width'" in result.stdout


def test_convert_changes_no_other_character_of_a_line() -> None:
    line = (
        '{ "width":100,"height" : 200 , "n":1.50, "big": 12345678901234567890.0, "caf\\u00e9": "\\u00e9\\/\u00e9",\t'
        '"messages" : [{"t\\u0065xt": "\\u00e9:\\n(000,500)", "k": [1,2]}, {"content": [{"text":"none \\/"}]}] }'
    )
    command = (*CONVERT, "-", "--text-field", "messages")
    result = run(*command, input=line + "  \r\n" + line)
    expected = line.replace("(000,500)", "(00,05)")
    assert result.stdout_bytes.decode() == expected + "  \r\n" + expected + "\n"
    broken = line.replace("(000,500)", "(1,2)")
    result = run(*command, "--on-error", "collect", input=broken)
    assert result.exit_code == 0
    head, _, error = result.stdout.rpartition(', "convert_error": ')
    assert head == broken[:-1]
    assert "malformed" in error
    deep = '{"width":100,"height":200,"text":"(000,500)","deep":' + "[" * 60 + "]" * 60 + "}"
    assert run(*CONVERT, "-", input=deep).stdout == deep.replace("(000,500)", "(00,05)") + "\n"


def test_convert_between_published_formats() -> None:
    # 1000 x 1000 pixels are 980 x 980 to this model, so 490 there is 500 here, and 500 * 999 / 1000 rounds to 500.
    text = 'It is here:\n```json\n[\n\t{"bbox_2d": [490, 98, 735, 686], "label": "cat"}\n]\n```'
    formats = ("--from", "qwen2_5_vl", "--to", "openpangu")
    result = run("convert", *formats, "-", input=lines({"text": text, "width": 1000, "height": 1000}))
    (got,) = rows(result.stdout)
    assert got["text"] == "It is here:\ncat (500,100),(749,699)"
    back = run("convert", "--from", "openpangu", "--to", "qwen2_5_vl", "-", input=lines(got))
    assert rows(back.stdout)[0]["text"] == text


BROKEN = {**ROW, "text": "(1,2)"}


def test_a_line_that_cannot_be_converted(tmp_path: Path) -> None:
    source, target = write(tmp_path / "a.jsonl", ROW, BROKEN, ROW), tmp_path / "b.jsonl"
    result = run(*CONVERT, source, "-o", target)
    assert result.exit_code == 2
    assert re.search(r"error: .*a\.jsonl, line 2: Position 0: ", said(result))
    assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

    result = run(*CONVERT, source, "--on-error", "skip")
    assert (result.exit_code, len(rows(result.stdout))) == (0, 2)
    assert said(result) == "2 lines converted, 1 skipped."

    result = run(*CONVERT, source, "--on-error", "collect")
    kept = rows(result.stdout)[1]
    assert kept.pop("convert_error").startswith("Position 0: ")
    assert kept == BROKEN
    assert said(result) == "2 lines converted, 1 kept unchanged."


def test_text_that_looks_like_coordinates_is_warned_of() -> None:
    arguments = ("convert", "-", "--from", "qwen2_vl", "--to", "openpangu")
    row = {"text": "dog(221,423),(569,886)", "width": 1000, "height": 1000}
    result = run(*arguments, input=lines(*[row] * 5))
    assert (result.exit_code, rows(result.stdout)) == (0, [row] * 5)
    assert "warning: standard input, line 1: Position 3: '(221,423),(569,886)' looks like" in said(result)
    assert "warning: 2 further texts look like coordinates. 5 lines converted." in said(result)
    assert said(run(*arguments, "--on-error", "skip", input=lines(row))) == "1 line converted."
    result = run("check", "-", "--format", "qwen2_vl", "--text-field", "text", input=lines(row))
    assert result.exit_code == 1
    assert "1 suspicious: text that looks like coordinates of the format" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (("--on-error", "drop"), lines(ROW), "`--on-error` must be one of raise, skip, collect, got 'drop'"),
        (("--to", "morse"), lines(ROW), "`format` must be a CoordinateFormat or one of"),
        (("--text-field", "answer"), lines(ROW), "line 1: A line must have the field 'answer', got id, text"),
        ((), "[1]\n", "standard input, line 1: Expected a JSON object, got list"),
        ((), "\n{", "standard input, line 2: Not valid JSON"),
        ((), lines({**ROW, "width": 0}), r"line 1: `\(width, height\)` must be \(width, height\), two positive"),
        (
            (),
            lines({**ROW, "width": None}),
            "line 1: A line must have the fields 'width' and 'height', or 'image', got id",
        ),
        ((), lines({**ROW, "width": None, "image": "no.png"}), "line 1: Image no.png does not exist"),
        ((), lines({**ROW, "text": 3}), "line 1: Expected a text or a list of messages, got 3"),
        (("-o", "/no/such/folder/b"), lines(ROW), "The output must be in an existing folder"),
    ],
)
def test_errors_exit_with_their_message(arguments: tuple[str, ...], text: str, message: str) -> None:
    result = run(*CONVERT, "-", *arguments, input=text)
    assert result.exit_code == 2
    assert re.search("error: .*" + message, said(result))


def test_files_are_not_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ROW)
    result = run(*CONVERT, source, "-o", tmp_path / "x" / ".." / "a.jsonl")
    assert result.exit_code == 2
    assert "`--output` must be another file than the input" in said(result)
    assert rows(source.read_text(encoding="utf-8")) == [ROW]
    result = run(*CONVERT, tmp_path / "none.jsonl")
    assert "The input must be a JSON Lines file" in said(result)


@pytest.mark.parametrize("orientation", [1, 6])
def test_sizes_come_from_images(tmp_path: Path, orientation: int) -> None:
    image, exif = Image.new("RGB", (100, 200)), Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "pictures").mkdir()
    image.save(tmp_path / "pictures" / "a.jpg", exif=exif)
    row = {"image": "a.jpg", "regions": [{"point": [0, 180]}]}
    source = write(tmp_path / "a.jsonl", row)
    result = run("check", source, "--image-root", tmp_path / "pictures")
    assert result.exit_code == (0 if orientation == 1 else 1), result.output


def test_the_pixel_limit_is_an_option(tmp_path: Path) -> None:
    picture(20, 10).save(tmp_path / "a.png")
    source = write(tmp_path / "a.jsonl", {"image": "a.png", "regions": [], "text": ""})
    for command in (("check", source), ("show", source, "-o", tmp_path / "b.png"), (*CONVERT, source)):
        result = run(*command, "--max-image-pixels", "199")
        assert result.exit_code == 2
        assert "a.png has more than 199 pixels; pass a larger `max_image_pixels`" in said(result)
        assert run(*command, "--max-image-pixels", "200").exit_code == 0


def test_regions_are_not_drawn_on_an_image_of_another_size(tmp_path: Path) -> None:
    """As if the size of the line were that before the EXIF orientation."""
    picture(20, 10).save(tmp_path / "a.png")
    source = write(tmp_path / "a.jsonl", {"image": "a.png", "width": 10, "height": 20, "regions": []})
    result = run("show", source, "-o", tmp_path / "b.png")
    assert result.exit_code == 2
    assert "a.png has 20 x 10 pixels after its EXIF orientation, but the line has 10 x 20" in said(result)


def test_lists_of_sizes_are_those_of_several_images() -> None:
    row = {
        "width": [100, 10],
        "height": [200, 10],
        "regions": [{"point": [9, 9], "image": 1}, {"point": [0, 11], "image": 1}],
    }
    result = run("check", "-", input=lines(row))
    assert result.exit_code == 1
    assert "1 outside" in result.stdout


def test_check_reports_problems_and_examples(tmp_path: Path) -> None:
    bad = [{"box": [60, 0, 50, 20]}, {"point": [101, 0]}, {"point": [102, 0]}, {"box": [1]}, {"point": [0, 0]}]
    row = {"width": 100, "height": 200}
    target = tmp_path / "problems.jsonl"
    source = write(tmp_path / "a.jsonl", {**row, "regions": []}, {**row, "regions": bad})
    result = run("check", source, "--format", "tens", "--examples", 1, "-o", target)
    assert result.exit_code == 1
    got = result.stdout.splitlines()
    assert got[0] == "5 regions checked for tens: 4 problems."
    assert got[1:3] == ["1 broken: not a region", "  line 2, 3: `box` must have 4 numbers, got 1."]
    assert got[3:5] == ["1 reordered: a box with x1 > x2 or y1 > y2", "  line 2, 0: box [60, 0, 50, 20]"]
    assert got[5] == "2 outside: leaves its image"
    assert got[6].startswith("  line 2, 1: point: `points[0]` [101.0, 0.0] leaves")
    assert len(got) == 7
    found = rows(target.read_text(encoding="utf-8"))
    assert [(item["line"], item["index"], item["problem"]) for item in found] == [
        (2, 0, "reordered"),
        (2, 1, "outside"),
        (2, 2, "outside"),
        (2, 3, "broken"),
    ]


def test_check_without_problems() -> None:
    row = {"width": 100, "height": 200, "regions": [{"box": [10, 0, 50, 19]}]}
    result = run("check", "-", input=lines(row))
    assert (result.exit_code, result.stdout) == (0, "1 region checked for openpangu: 0 problems.\n")
    result = run("check", "-", "--format", "tens", input=lines(row))
    assert result.exit_code == 0
    row["regions"] = [{"box": [15, 0, 50, 19]}]
    result = run("check", "-", "--format", "tens", input=lines(row))
    assert result.exit_code == 1
    assert "1 moved: moves too far" in result.stdout
    assert run("check", "-", "--format", "tens", "--most", 5, input=lines(row)).exit_code == 0


def test_check_says_what_a_published_format_cannot_hold() -> None:
    regions = [{"box": [0, 0, 1, 1]}, {"box": [0, 0, 3999, 3000]}, {"point": [3, 4]}]
    row = {"width": 4000, "height": 3000, "regions": regions}
    result = run("check", "-", "--format", "kosmos2", "-o", "-", input=lines(row))
    assert [problem["problem"] for problem in rows(result.stdout)] == ["moved", "moved", "unwritable"]
    assert run("check", "-", "--format", "qwen3_vl", "--most", 2, input=lines(row)).exit_code == 0


def test_check_writes_problems_to_the_standard_output() -> None:
    row = {"width": 100, "height": 200, "boxes": [{"point": [101, 0]}]}
    result = run("check", "-", "-o", "-", "--regions-field", "boxes", input=lines(row))
    (problem,) = rows(result.stdout)
    assert problem["problem"] == "outside"
    assert "1 region checked" in result.stderr


def test_reasoning_is_skipped() -> None:
    thought = {**ROW, "text": "<think>cat (0,5)</think>" + ROW["text"]}
    result = run(*CONVERT, "-", "--skip-thinking", input=lines(thought))
    assert rows(result.stdout) == [{**ROW, "text": "<think>cat (0,5)</think><see cat>(00,05),(10,10)."}]
    check = ("check", "-", "--text-field", "text")
    assert run(*check, input=lines(thought)).exit_code == 1
    assert run(*check, "--skip-thinking", input=lines(thought)).exit_code == 0
    result = run("check", "-", "--skip-thinking", input=lines(thought))
    assert (result.exit_code, "`--skip-thinking` needs `--text-field`" in said(result)) == (2, True)


def test_check_reads_training_records_and_texts() -> None:
    block = {"label": "cat", "box": [60, 0, 50, 20]}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ["so: ", block]}]
    result = run("check", "-", input=lines({"width": 100, "height": 200, "messages": messages}))
    assert (result.exit_code, "1 reordered" in result.stdout) == (1, True)
    result = run("check", "-", "--text-field", "text", input=lines(ROW, BROKEN))
    assert result.exit_code == 1
    assert result.stdout.splitlines()[:2] == [
        "2 texts checked for openpangu: 1 problem.",
        "1 unreadable: text that cannot be read in the format",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"width": 1, "height": 1},
            "A line must have the field 'regions' or messages, got width, height",
        ),
        ({"width": 1, "height": 1, "regions": 3}, "The field 'regions' must contain a list of regions, got 3"),
    ],
)
def test_lines_that_cannot_be_checked(row: Any, message: str) -> None:
    result = run("check", "-", input=lines(row))
    assert result.exit_code == 2
    assert f"standard input, line 1: {message}" in said(result)


@pytest.fixture
def pictured(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    region = {"box": [10, 20, 50, 60], "label": "cat"}
    text = {"image": "a.png", "text": "cat (100,100),(500,300) and (1,2)"}
    return write(tmp_path / "a.jsonl", {**text, "regions": [region]}, text, {"image": "a.png", "regions": [region]})


def test_show_draws(pictured: Path) -> None:
    target = pictured.parent / "out.png"
    result = run("show", pictured, "-o", target, "--columns", 2)
    assert result.exit_code == 0, result.output
    with Image.open(target) as picture:
        assert min(picture.size) > 300
        four = np.asarray(picture.convert("RGB")).shape
    assert said(result).startswith("3 pictures in")
    run("show", pictured, "-o", target, "--limit", 1)
    with Image.open(target) as picture:
        assert np.asarray(picture.convert("RGB")).shape < four


def test_what_show_draws(pictured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("vlparts.show.box_grid", lambda items, path, columns: drawn.extend(items))
    run("show", pictured, "-o", pictured.parent / "out.png")
    assert [sorted(set(item) & {"predicted", "truth"}) for item in drawn] == [
        ["predicted", "truth"],
        ["predicted"],
        ["truth"],
    ]
    assert len(drawn[0]["predicted"]) == 1
    assert drawn[0]["truth"][0].xyxy == (10, 20, 50, 60)


def test_show_draws_training_records(pictured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("vlparts.show.box_grid", lambda items, path, columns: drawn.extend(items))
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": {"box": [10, 20, 50, 60]}}]
    record = write(pictured.parent / "b.jsonl", {"image": "a.png", "messages": messages})
    assert run("show", record, "-o", pictured.parent / "out.png").exit_code == 0
    assert drawn[0]["truth"][0].xyxy == (10, 20, 50, 60)
    assert "predicted" not in drawn[0]


def test_show_needs_a_folder(pictured: Path) -> None:
    result = run("show", pictured, "-o", pictured.parent / "none" / "out.png")
    assert (result.exit_code, "The output must be in an existing folder" in said(result)) == (2, True)


def test_show_says_what_is_missing(pictured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("show", write(pictured.parent / "b.jsonl", {"image": "a.png"}), "-o", pictured.parent / "b.png")
    assert (result.exit_code, "A line must have the field 'text' or 'regions'" in said(result)) == (2, True)
    result = run(
        "show", write(pictured.parent / "b.jsonl", {**ROW, "image": "none.png"}), "-o", pictured.parent / "b.png"
    )
    assert (result.exit_code, "none.png does not exist" in said(result)) == (2, True)
    monkeypatch.setattr("vlparts.show.box_grid", lambda *args: builtins.__import__("no_such_module"))
    result = run("show", pictured, "-o", pictured.parent / "b.png")
    assert (result.exit_code, "No module named" in said(result)) == (2, True)
