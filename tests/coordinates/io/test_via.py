"""Projects and annotations of the VGG Image Annotator."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlparts.coordinates import ImageRegions, Region, read_via, write_coco

SIZES = {"a.png": (200, 100), "b.png": (30, 40)}


def entry(*shapes: Any, attributes: Any = None, **changes: Any) -> dict[str, Any]:
    regions = [{"shape_attributes": shape, "region_attributes": attributes or {}} for shape in shapes]
    return {"filename": "a.png", "size": 1234, "regions": regions, "file_attributes": {}, **changes}


def write(tmp_path: Path, document: Any, bom: bytes = b"") -> Path:
    path = tmp_path / "via.json"
    path.write_bytes(bom + json.dumps(document).encode())
    return path


RECT = {"name": "rect", "x": 10, "y": 20, "width": 30, "height": 40.5}
CIRCLE = {"name": "circle", "cx": 5, "cy": 6, "r": 3}
ELLIPSE = {"name": "ellipse", "cx": 5, "cy": 6, "rx": 3, "ry": 2, "theta": 0.5}


def test_shapes_and_attributes(tmp_path: Path) -> None:
    xs, ys = [1, 5, 5.5], [1, 1, 8]
    shapes = [
        RECT,
        {"name": "polygon", "all_points_x": xs, "all_points_y": ys},
        {"name": "polyline", "all_points_x": xs[:2], "all_points_y": ys[:2]},
        {"name": "point", "cx": 7, "cy": 8},
    ]
    attributes = {"type": "cat", "colour": {"red": True}}
    metadata = {
        "a.png1234": entry(*shapes, attributes=attributes, file_attributes={"caption": "two"}),
        "b.png-1": entry(filename="b.png", size=-1),
    }
    project = {"_via_settings": {}, "_via_img_metadata": metadata, "_via_attributes": {}}
    expected = [
        Region.box(10, 20, 40, 60.5),
        Region.polygon(list(zip(xs, ys, strict=True))),
        Region.line([(1, 1), (5, 1)]),
        Region.point(7, 8),
    ]
    for document in (project, metadata):
        for sizes in (SIZES, SIZES.__getitem__):
            first, second = read_via(write(tmp_path, document, b"\xef\xbb\xbf"), sizes, label="type")
            assert second == ImageRegions("b.png", 30, 40)
            assert (first.image, first.size, first.attributes) == ("a.png", (200, 100), {"caption": "two"})
            assert [(region.kind, region.points) for region in first.regions] == [
                (region.kind, region.points) for region in expected
            ]
            assert {region.label for region in first.regions} == {"cat"}
            assert all(region.attributes == {"colour": {"red": True}} for region in first.regions)
    (first, _) = read_via(write(tmp_path, project), SIZES)
    assert (first.regions[0].label, first.regions[0].attributes) == (None, attributes)


def test_regions_of_version_1_are_an_object(tmp_path: Path) -> None:
    made = entry(RECT, attributes={"name": ""})
    made["regions"] = {"0": made["regions"][0]}
    (image,) = read_via(write(tmp_path, {"a": made}), SIZES, label="name")
    assert image.regions == (Region.box(10, 20, 40, 60.5),)


def test_circles_and_ellipses_raise_or_are_skipped(tmp_path: Path) -> None:
    for shape in (CIRCLE, ELLIPSE, {"name": "blob"}):
        path = write(tmp_path, {"a": entry(RECT, shape)})
        message = (
            r"via\.json: `\['a'\]\.regions\[1\]\.shape_attributes\.name` must be rect, polygon, polyline or point, "
            rf"got '{shape['name']}'; on_unsupported='skip' omits it\.$"
        )
        with pytest.raises(ValueError, match=message):
            read_via(path, SIZES)
        assert len(read_via(path, SIZES, on_unsupported="skip")[0].regions) == 1
    with pytest.raises(ValueError, match="^`on_unsupported` must be one of 'raise', 'skip', got 'box'"):
        read_via(path, SIZES, on_unsupported="box")


PLACE = r"via\.json: `_via_img_metadata\['a'\]\.regions\[0\]"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (entry({**RECT, "x": "1"}), PLACE + r"\.shape_attributes\.x` must be a number, got '1'"),
        (entry({**RECT, "height": -1}), PLACE + r"\.shape_attributes\.height` must be a number of at least 0, got -1"),
        (entry({"name": "point", "cx": 1}), PLACE + r"\.shape_attributes\.cy` is missing; expected a number"),
        (
            entry({"name": "polygon", "all_points_x": [1], "all_points_y": []}),
            PLACE + r"\.shape_attributes\.all_points_x` and `all_points_y` must have the same length, got 1 and 0",
        ),
        (
            entry({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1, 2]}),
            PLACE + r"\.shape_attributes`: A polygon has at least 3 point\(s\), got 2",
        ),
        (
            entry({"name": "polygon", "all_points_x": [None], "all_points_y": [1]}),
            PLACE + r"\.shape_attributes\.all_points\[0\]` must be a list of two numbers, got \(None, 1\)",
        ),
        (entry(5), PLACE + r"\.shape_attributes` must be an object, got 5"),
        (
            entry(RECT, attributes={"type": 5}),
            PLACE + r"\.region_attributes\.type` must be a string, the label, got 5",
        ),
        (entry(regions=[7]), PLACE + r"` must be an object, got 7"),
        (entry(regions=7), r"`_via_img_metadata\['a'\]\.regions` must be a list, got 7"),
        (entry(filename="c.png"), r"`_via_img_metadata\['a'\]` has no width and height of image 'c\.png'"),
        (entry(filename=None), r"`_via_img_metadata\['a'\]\.filename` must be a string, got None"),
        (entry(file_attributes=[]), r"\['a'\]\.file_attributes` must be an object, got \[\]"),
        (7, r"`_via_img_metadata\['a'\]` must be an object, got 7"),
    ],
)
def test_errors_name_place_value_and_expectation(tmp_path: Path, made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_via(write(tmp_path, {"_via_img_metadata": {"a": made}}), SIZES, label="type")


def test_other_files_raise(tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    write_coco([ImageRegions("a.png", 4, 5)], path)
    with pytest.raises(ValueError, match=r"coco\.json: Expected a project .* of VIA 1 or 2, got the keys of COCO"):
        read_via(path, SIZES)
    for document, message in (
        ([1], r"an object, got \[1\]"),
        ({"project": {}, "metadata": {}}, "got a project of VIA 3"),
    ):
        with pytest.raises(ValueError, match=rf"via\.json: Expected a project .* of VIA 1 or 2.*{message}"):
            read_via(write(tmp_path, document), SIZES)
    with pytest.raises(
        ValueError, match=r"^`path` must be a JSON file of VIA, got .*none\.json, which does not exist"
    ):
        read_via(tmp_path / "none.json", SIZES)
