"""Conversion between formats within a text."""

from typing import Any

import pytest

from tests.coordinates.grammars.tagged_examples import FORMATS
from vlparts.coordinates.checking import check_text
from vlparts.coordinates.codec import CoordinateError
from vlparts.coordinates.conversion import convert

SIZE = (999, 999)  # one code per pixel


def test_regions_change_and_text_stays() -> None:
    text = (
        "Here:\n<ref>a cat</ref><box>(1,2),(30,400)</box>\n<box>(5,6),(7,8)</box>, and more. "
        "<ref>dog</ref><box>(1,1),(2,2)</box>!"
    )
    assert convert(text, FORMATS["marks"], None, SIZE) == (
        "Here:\na cat (001,002),(030,400)\n(005,006),(007,008), and more. dog (001,001),(002,002)!"
    )


def test_runs_take_the_separator_and_the_groups_of_the_target() -> None:
    text = "a cat (001,002),(030,400)\na cat (001,002),(003,004)\ndog (005,006),(007,008)\n\nBye."
    assert convert(text, "openpangu", FORMATS["list"], SIZE) == (
        "<ref>a cat</ref><det>[[1, 2, 30, 400], [1, 2, 3, 4]]</det>\n<ref>dog</ref><det>[[5, 6, 7, 8]]</det>\n\nBye."
    )
    listed = "<ref>a</ref><det>[[1, 2, 3, 4], [5, 6, 7, 8]]</det>"
    assert convert(listed, FORMATS["list"], FORMATS["bare"], SIZE) == "a [1, 2, 3, 4], a [5, 6, 7, 8]"


@pytest.mark.parametrize(
    "middle", ["marks", "list", "double", "behind", "behind_plain", "bare", "decimals", "growing"]
)
def test_there_and_back(middle: str) -> None:
    text = "Two:\n\na cat (001,002),(030,400)\ndog (005,006),(007,008)"
    there = convert(text, None, FORMATS[middle], SIZE)
    assert there != text
    assert convert(there, FORMATS[middle], None, SIZE) == text


def test_text_without_regions_stays() -> None:
    assert convert("Nothing (2) here.", None, FORMATS["marks"], SIZE) == "Nothing (2) here."
    assert convert("", None, FORMATS["marks"], SIZE) == ""


def test_broken_regions_raise_or_stay() -> None:
    text = "a (001,002),(003,004)\nb (1,2)\nc (005,006),(007,008)"
    with pytest.raises(CoordinateError, match="Position 24: malformed") as caught:
        convert(text, None, FORMATS["marks"], SIZE)
    assert caught.value.position == 24
    assert convert(text, None, FORMATS["marks"], SIZE, on_error="keep") == (
        "<ref>a</ref><box>(1,2),(3,4)</box>\nb (1,2)\n<ref>c</ref><box>(5,6),(7,8)</box>"
    )


def test_what_the_target_cannot_say_is_an_error_with_its_place() -> None:
    with pytest.raises(
        CoordinateError, match="Position 3: .* is a point, which format 'marks' cannot write"
    ) as caught:
        convert("x:\n(001,002)", None, FORMATS["marks"], SIZE)
    assert caught.value.position == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((b"", None, None, SIZE), "`text` must be a str, got bytes"),
        (("", "unknown", None, SIZE), "`format` must be a CoordinateFormat or one of"),
        (("", None, "unknown", SIZE), "`format` must be a CoordinateFormat or one of"),
        (("", None, None, 5), "`image_size` must be"),
    ],
)
def test_bad_arguments_raise(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(*arguments)
    with pytest.raises(ValueError, match="`on_error` must be one of 'raise', 'keep', got 'skip'"):
        convert("", None, None, SIZE, on_error="skip")


def test_identities_are_left_out_where_the_target_has_no_place_for_them() -> None:
    text = '<points coords="1 1 100 200 2 300 400">two</points>'
    assert convert(text, "molmo2", None, (999, 999)) == "two (100,200)\ntwo (300,400)"


def test_regions_within_the_same_marks_are_one_run() -> None:
    text = "<phrase>a</phrase><object><patch_index_0000><patch_index_0033></delimiter_of_multi_objects/>"
    text += "<patch_index_0000><patch_index_0066></object>"
    assert convert(text, "kosmos2", "kosmos2", SIZE) == text


BOX = '{"bbox_2d":[50,117,346,168],"label":"a"}'
LIST = '[\n  {"box_2d": [117, 50, 168, 346], "label": "a"}\n]'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"page":1,"items":', "}"),
        ('{"items":', "}"),
        ('{"items":', ', "note": "x"}'),
        ('{"a":{"b":[', ", 2]}}"),
        ("```json\n", ""),
        ("", "\n```"),
        ('{"first":', ',"second":[5]}'),
    ],
)
def test_text_around_a_json_list_is_kept(before: str, after: str) -> None:
    text = f"{before}[{BOX}]{after}"
    assert convert(text, "qwen3_vl", "gemini", (1000, 1000)) == before + LIST + after


def test_json_lists_and_objects_are_not_merged() -> None:
    text = f'{{"page": [{BOX}], "next":\n[[{BOX}]], "one": {BOX}}}'
    expected = f'{{"page": {LIST}, "next":\n[{LIST}], "one": {LIST}}}'
    assert convert(text, "qwen3_vl", "gemini", (1000, 1000)) == expected
    assert convert(f"[[{BOX}],[{BOX}]]", "qwen3_vl", "gemini", (1000, 1000)) == f"[{LIST},{LIST}]"
    spread = f"[{BOX}\n\n,{BOX}]"
    assert convert(spread, "qwen3_vl", "gemini", (1000, 1000)).count("label") == 2
    assert convert(spread, "qwen3_vl", "gemini", (1000, 1000)).count("[\n") == 1


def test_text_between_json_objects_with_a_key_per_number_is_kept() -> None:
    text = 'One {"x": 0.5, "y": 0.5} and two {"x": 0.25, "y": 0.5}.'
    assert convert(text, "moondream", None, (100, 100)) == "One (500,500) and two (250,500)."
    text = '{"objects": [{"x_min": 0.1, "y_min": 0.2, "x_max": 0.3, "y_max": 0.4}], "points": [{"x": 0.5, "y": 0.5}]}'
    assert convert(text, "moondream", None, (100, 100)) == '{"objects": (100,200),(300,400), "points": (500,500)}'


@pytest.mark.parametrize(
    ("source", "text", "position", "message"),
    [
        ("qwen3_vl", '[{"bbox_2d":[50,117,346,168],"width": 12}]', 29, "key 'width' would be lost"),
        ("qwen3_vl", f'[{BOX}, {{"bbox_2d": [1,2,3,4], "center": [2, 3]}}]', 66, "key 'center' would be lost"),
        ("qwen3_vl", f'{{"bbox_2d": [1,2,3,4], "part": {BOX}}}', 23, "key 'part' would be lost"),
        ("qwen3_vl", f'[{BOX}, "note", {BOX}]', 41, "a list with other items than regions would be lost"),
        ("qwen3_vl", f'[{{"page": 1}}, {BOX}]', 14, "a list with other items than regions would be lost"),
        ("molmo", '<point x="1.0" y="2.0" alt="a" id="7">a</point>', 31, "attribute 'id' would be lost"),
        ("molmo", '<point x="1.0" y="2.0" alt="b">a</point>', 23, "attribute 'alt' would be lost"),
        ("molmo2", '<points coords="1 1 100 200" alt="b">b</points>', 29, "attribute 'alt' would be lost"),
        ("paligemma", "<loc0001><loc0002><loc0003><loc0004><seg001> cat", 36, "'<seg001>' would be lost"),
    ],
)
@pytest.mark.parametrize("target", ["source", "openpangu"])
def test_text_that_would_be_lost_is_an_error(source: str, text: str, position: int, message: str, target: str) -> None:
    target = source if target == "source" else target
    with pytest.raises(CoordinateError, match=f"Position {position}: .*{message}") as caught:
        convert(text, source, target, (1000, 1000))
    assert caught.value.position == position
    assert convert(text, source, target, (1000, 1000), on_error="keep") == text
    (problem, *_) = check_text(text, (1000, 1000), source)
    assert problem.name == "lost"
    assert problem.detail.startswith(f"position {position}: ")


@pytest.mark.parametrize(
    ("text", "target", "position", "message"),
    [
        ('[{"bbox_2d":[50,117,346,168],"text_content":"ACME"}]', "openpangu", 29, "key 'text_content' would be lost"),
        (f'[{BOX}, {{"bbox_2d": [1,2,3,4], "score": 0.5}}]', "qwen2_vl", 66, "key 'score' would be lost"),
        ('{"a": [{"b": 1}], "b": "c", "bbox_2d": [1,2,3,4]}', "molmo2", 1, "key 'a' would be lost"),
        ('[{"bbox_2d": [1,2,3,4], "w": [5]}]', "gemini", 24, "'w' would be lost: its numbers would not be converted"),
        ('[{"bbox_2d": [1,2,3,4], "box_2d": "x"}]', "gemini", 24, "'box_2d' would be lost: the format to write uses"),
    ],
)
def test_keys_without_a_place_in_the_target_are_an_error(text: str, target: str, position: int, message: str) -> None:
    with pytest.raises(CoordinateError, match=f"^Position {position}: .*{message}") as caught:
        convert(text, "qwen3_vl", target, (1000, 1000))
    assert caught.value.position == position
    assert convert(text, "qwen3_vl", target, (1000, 1000), on_error="keep") == text
    assert (check_text(text, (1000, 1000), "qwen3_vl") == []) == ("'w'" not in message)


def test_further_keys_come_along_character_for_character() -> None:
    further = (
        '"score": 0.50, "n": 12345678901234567890.10, "k\\u00e9y": "caf\\u00e9\\/", "mask" :{ "rle":[1,  2] }, '
        '"colour": [255, 0, 0], "children": [{"text": "a"}], "none": null, "ok": true, "e": 1E5'
    )
    text = f'See [{{"score": 7, "bbox_2d": [50,117,346,168], "label": "a"}}, {{"bbox_2d": [1,2,3,4], {further}}}].'
    expected = (
        'See [\n  {"box_2d": [117, 50, 168, 346], "label": "a", "score": 7},\n  {"box_2d": [2, 1, 4, 3], '
        + further.replace('"mask" :', '"mask": ')
        + "}\n]."
    )
    there = convert(text, "qwen3_vl", "gemini", (1000, 1000))
    assert there == expected
    assert convert(there, "gemini", "gemini", (1000, 1000)) == there
    points = convert('{"x": 0.5, "y": 0.25, "seen": 0.90}', "moondream", "qwen3_vl", (1000, 1000))
    assert points == '```json\n[\n\t{"point_2d": [500, 250], "seen": 0.90}\n]\n```'


def test_a_json_list_with_an_error_stays_whole() -> None:
    for broken in ("[1,2,3]", "[5,6,1,2]", "[0,0,1,1001]"):
        text = f'[{BOX}, {{"bbox_2d": {broken}}}, {BOX}]'
        with pytest.raises(CoordinateError, match="Position (43|55): "):
            convert(text, "qwen3_vl", "gemini", (1000, 1000))
        assert convert(text, "qwen3_vl", "gemini", (1000, 1000), on_error="keep") == text


def test_an_answer_that_there_is_no_region_is_kept(recwarn: pytest.WarningsRecorder) -> None:
    none = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>None<|box_end|>"
    text = f"{none}, <|object_ref_start|>ox<|object_ref_end|><|box_start|><9><9><99><99><|box_end|>, {none}"
    converted = convert(text, "rex_omni", "internvl", (999, 999))
    assert converted == f"{none}, <ref>ox</ref><box>[[9, 9, 99, 99]]</box>, {none}"
    assert convert(none, "rex_omni", "internvl", (999, 999)) == none
    assert not recwarn.list


def test_single_brackets_of_glm_are_converted() -> None:
    text = "at <|begin_of_box|>[1, 2, 3, 4], [5, 6, 7, 8]<|end_of_box|>, or <|begin_of_box|>[10, 20]<|end_of_box|>"
    converted = (
        "at <|box_start|>(1,2),(3,4)<|box_end|><|box_start|>(5,6),(7,8)<|box_end|>, or <|box_start|>(10,20)<|box_end|>"
    )
    assert convert(text, "glm_4_5v", "qwen2_vl", (1000, 1000)) == converted
