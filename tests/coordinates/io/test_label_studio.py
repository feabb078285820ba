"""Exports of Label Studio."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlparts.coordinates import ImageRegions, Region, read_label_studio

SIZE = {"original_width": 200, "original_height": 100, "image_rotation": 0}


def result(kind: str, value: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": kind, "from_name": "tag", "to_name": "image", **SIZE, "value": value, **more}


RECTANGLE = result("rectanglelabels", {"x": 10, "y": 20, "width": 30, "height": 40, "rectanglelabels": ["cat"]})


def task(*results: Any, **changes: Any) -> dict[str, Any]:
    return {"id": 1, "data": {"image": "a.png"}, "annotations": [{"id": 5, "result": list(results)}], **changes}


def write(tmp_path: Path, *tasks: Any, bom: bytes = b"") -> Path:
    path = tmp_path / "export.json"
    path.write_bytes(bom + json.dumps(list(tasks)).encode())
    return path


def read_one(tmp_path: Path, *results: Any, **options: Any) -> ImageRegions:
    (image,) = read_label_studio(write(tmp_path, task(*results)), **options)
    return image


def test_percent_become_pixels(tmp_path: Path) -> None:
    points = [[0, 0], [50, 0], [50, 100]]
    image = read_one(
        tmp_path,
        RECTANGLE,
        result("polygonlabels", {"points": points, "closed": True, "polygonlabels": ["roof"]}, score=0.5),
        result("polygon", {"points": points[:2], "closed": False}),
        result("keypointlabels", {"x": 25, "y": 50, "width": 0.3, "keypointlabels": ["nose"]}),
    )
    assert (image.image, image.size, image.attributes) == ("a.png", (200, 100), {})
    assert image.regions == (
        Region.box(20, 20, 80, 60, "cat"),
        Region.polygon([(0, 0), (100, 0), (100, 100)], "roof", 0.5),
        Region.line([(0, 0), (100, 0)]),
        Region.point(50, 50, "nose"),
    )


@pytest.mark.parametrize(
    ("angle", "corners"),
    [
        (90, [(20, 20), (20, 80), (-20, 80), (-20, 20)]),
        (-90, [(20, 20), (20, -40), (60, -40), (60, 20)]),
        (180, [(20, 20), (-40, 20), (-40, -20), (20, -20)]),
    ],
)
def test_a_rotated_rectangle_is_a_quad(tmp_path: Path, angle: float, corners: list[tuple[float, float]]) -> None:
    """It turns clockwise about its upper left corner, in pixels: 60 x 40 at (20, 20)."""
    rotated = {**RECTANGLE, "value": {**RECTANGLE["value"], "rotation": angle}}
    (region,) = read_one(tmp_path, rotated).regions
    assert (region.kind, region.label) == ("quad", "cat")
    assert np.allclose(region.points, corners, atol=1e-9)
    for whole in (0, 360, None):
        rotated["value"]["rotation"] = whole
        assert read_one(tmp_path, rotated).regions == (Region.box(20, 20, 80, 60, "cat"),)


def test_results_with_one_id_are_one_region(tmp_path: Path) -> None:
    place = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0}
    image = read_one(
        tmp_path,
        result("rectangle", place, id="r", meta={"text": ["smudged"]}),
        result("labels", {**place, "labels": ["line", "title"]}, id="r"),
        result("textarea", {**place, "text": ["EXIT"]}, id="r", from_name="transcription"),
        result("choices", {"choices": ["outdoor"]}, id="c", from_name="scene"),
        result("labels", {**place, "labels": ["alone"]}, id="s"),
    )
    attributes = {"meta": {"text": ["smudged"]}, "labels": ["line", "title"], "transcription": ["EXIT"]}
    box = Region.box(20, 20, 80, 60, "line", attributes=attributes)
    assert image.regions == (box, Region.box(20, 20, 80, 60, "alone"))
    assert image.attributes == {"scene": ["outdoor"]}


def test_which_annotations_are_read(tmp_path: Path) -> None:
    other = {**RECTANGLE, "value": {**RECTANGLE["value"], "rectanglelabels": ["dog"]}}
    cancelled = {"result": [RECTANGLE], "was_cancelled": True}
    several = [{"result": [RECTANGLE]}, cancelled, {"result": [other]}, cancelled]
    made = task(annotations=several, predictions=[{"result": [{**other, "score": 0.25}]}])
    path = write(tmp_path, made, bom=b"\xef\xbb\xbf")
    for choose, label in (("first", "cat"), ("last", "dog")):
        assert [region.label for region in read_label_studio(path, choose=choose)[0].regions] == [label]
    assert read_label_studio(path, part="predictions")[0].regions[0].score == 0.25
    with pytest.raises(ValueError, match=r"export\.json: `\[0\]\.annotations` must have one entry .*, got 2; choose="):
        read_label_studio(path)
    path = write(tmp_path, task(annotations=[cancelled], data={"photo": "b.png", "page": 3}))
    for sizes in ({"b.png": (7, 8)}, lambda name: (7, 8) if name == "b.png" else None):
        (image,) = read_label_studio(path, image_field="photo", sizes=sizes)
        assert image == ImageRegions("b.png", 7, 8, (), {"page": 3})


def test_what_is_no_region_raises_or_is_skipped(tmp_path: Path) -> None:
    ellipse = result("ellipselabels", {"x": 1, "y": 2, "radiusX": 3, "radiusY": 4, "ellipselabels": ["a"]}, id="e")
    note = result("textarea", {"text": ["of the ellipse"]}, id="e", from_name="note")
    for other in (ellipse, result("brushlabels", {"rle": [1]}), {"type": "relation", "from_id": "a", "to_id": "b"}):
        with pytest.raises(
            ValueError, match=rf"\[0\]\.result\[1\]\.type` must be a rectangle.*, got '{other['type']}'"
        ):
            read_one(tmp_path, RECTANGLE, other)
        image = read_one(tmp_path, note, other, RECTANGLE, on_unsupported="skip")
        assert image.regions == (Region.box(20, 20, 80, 60, "cat"),)
        assert image.attributes == ({} if other is ellipse else {"note": ["of the ellipse"]})


def changed(**value: Any) -> dict[str, Any]:
    return {**RECTANGLE, "value": {**RECTANGLE["value"], **value}}


PLACE = r"export\.json: `\[0\]\.annotations\[0\]\.result\[0\]"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(width="30"), PLACE + r"\.value\.width` must be a number of at least 0, got '30'"),
        (changed(width=-1), PLACE + r"\.value\.width` must be a number of at least 0, got -1"),
        (changed(x=10**400), PLACE + r"\.value\.x` must be a number, got 1000"),
        (
            result("polygon", {"points": [[1, 10**400]]}),
            PLACE + r"\.value\.points\[0\]` must be a list of two numbers",
        ),
        (changed(x=True), PLACE + r"\.value\.x` must be a number, got True"),
        (changed(rectanglelabels="cat"), PLACE + r"\.value\.rectanglelabels` must be a list, got 'cat'"),
        (changed(rectanglelabels=[5]), PLACE + r"\.value\.rectanglelabels` must be a list of strings, got \[5\]"),
        ({**RECTANGLE, "value": {"x": 1}}, PLACE + r"\.value\.y` is missing; expected a number"),
        ({**RECTANGLE, "value": 5}, PLACE + r"\.value` must be an object, got 5"),
        ({**RECTANGLE, "type": None}, PLACE + r"\.type` must be a string, got None"),
        ({**RECTANGLE, "id": [1]}, PLACE + r"\.id` must be a string or an integer, got \[1\]"),
        ({**RECTANGLE, "image_rotation": 90}, PLACE + r"\.image_rotation` must be 0, .*, got 90"),
        ({**RECTANGLE, "item_index": 2}, PLACE + r"\.item_index` must be 0, .*, got 2"),
        ({**RECTANGLE, "original_width": 0}, r"result\[0\]\.original_width, original_height\)` must be .*\(0, 100\)"),
        ({**RECTANGLE, "score": "high"}, PLACE + r"`: `score` must be a real number, got 'high'"),
        (result("polygon", {"points": [[1, 2], [3, 4]]}), PLACE + r"`: A polygon has at least 3 point\(s\), got 2"),
        (result("polygon", {"points": [[1]]}), PLACE + r"\.value\.points\[0\]` must be a list of two numbers, got"),
        (7, r"`\[0\]\.annotations\[0\]\.result\[0\]` must be an object, got 7"),
    ],
)
def test_errors_name_place_value_and_expectation(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_one(tmp_path, given)


def test_results_that_contradict_each_other_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"result\[1\]` must have the size \(200, 100\) .* before, got \(300, 100\)"):
        read_one(tmp_path, RECTANGLE, {**RECTANGLE, "original_width": 300})
    with pytest.raises(ValueError, match=r"result\[1\]` must have the shape of .*result\[0\], whose id it has: 'r'"):
        read_one(tmp_path, {**RECTANGLE, "id": "r"}, {**changed(x=11), "id": "r"})
    note = result("choices", {"choices": ["a"]})
    with pytest.raises(ValueError, match=r"result\[1\]\.from_name` must be the name of one result, got 'tag' for sev"):
        read_one(tmp_path, note, note)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}', "Expected a list of tasks, as in a JSON export, got "),
        (b"[5]", r"`\[0\]` must be an object, got 5"),
        (b'[{"image": "a.png", "label": []}]', r"`\[0\]\.data` is missing; expected an object"),
        (b'[{"data": {"text": "a"}}]', r"`\[0\]\.data\.image` is missing; expected a string"),
        (
            b'[{"data": {"image": "a.png"}}]',
            r"`\[0\]` has no width and height of image 'a\.png'; expected them in `siz",
        ),
        (b'[{"data": {"image": "a.png"}, "annotations": 5}]', r"`\[0\]\.annotations` must be a list, got 5"),
        (b'[{"a": NaN}]', "NaN is not a valid number"),
        (b'["\xff"]', "Not valid UTF-8"),
        (b"[", "Not valid JSON"),
    ],
)
def test_other_files_raise(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.json: .*" + message):
        read_label_studio(path)


@pytest.mark.parametrize("name", ["part", "choose", "on_unsupported"])
def test_arguments_are_checked(tmp_path: Path, name: str) -> None:
    options: Any = {name: "some"}
    with pytest.raises(ValueError, match=f"^`{name}` must be one of "):
        read_label_studio(write(tmp_path), **options)
    with pytest.raises(
        ValueError, match=r"^`path` must be a JSON file of Label Studio, got .*, which does not exist\.$"
    ):
        read_label_studio(tmp_path / "none.json")
