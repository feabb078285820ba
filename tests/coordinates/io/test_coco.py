"""COCO files: exact round trips, and files of other writers."""

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlparts.coordinates.io.annotations import ImageRegions
from vlparts.coordinates.io.coco import read_coco, write_coco
from vlparts.coordinates.metrics.iou import inside_polygon
from vlparts.coordinates.regions import KINDS, Region

places = st.floats(0, 1e5)
ATTRIBUTES = st.sampled_from([{}, {"occluded": False, "text": "caf\u00e9"}, {"attributes": [1, 2]}])


@st.composite
def regions(draw: st.DrawFn) -> Region:
    kind = draw(st.sampled_from(["point", "box", "quad", "polygon"]))
    least, most = KINDS[kind]
    points = draw(st.lists(st.tuples(places, places), min_size=least, max_size=most or least + 3))
    if kind == "box":
        points = list(zip(*map(sorted, zip(*points, strict=True)), strict=True))  # type: ignore[arg-type]
    label, score = draw(st.sampled_from([None, "cat", "Katze auf Dach"])), draw(st.none() | places)
    identity, attributes = draw(st.none() | st.integers(0, 99)), draw(ATTRIBUTES)
    return Region(kind, tuple(points), label, score, 0, identity, attributes=attributes)


images = st.builds(
    ImageRegions, st.text("ab/.", min_size=1), st.integers(1, 99), st.just(7), st.lists(regions()), ATTRIBUTES
)


@settings(max_examples=60)
@given(st.lists(images, max_size=3))
def test_files_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, listed: list[ImageRegions]) -> None:
    path = tmp_path_factory.mktemp("coco") / "a.json"
    write_coco(listed, path)
    assert read_coco(path) == listed
    document = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(document) == ["annotations", "categories", "images"]
    for name in document:
        numbers = [entry["id"] for entry in document[name]]
        assert numbers == list(range(1, len(numbers) + 1))


def write(tmp_path: Path, **changes: Any) -> Path:
    document = {
        "images": [{"id": 5, "file_name": "a.png", "width": 40, "height": 30, "license": 1}],
        "categories": [{"id": 18, "name": "dog", "keypoints": ["nose", "tail"]}],
        "annotations": [
            {
                "id": 7,
                "image_id": 5,
                "category_id": 18,
                "bbox": [1, 2, 10.5, 20],
                "segmentation": [[1, 2, 11, 2, 6, 22], [0, 0, 1, 0, 1, 1]],
                "keypoints": [3, 4, 2, 0, 0, 0],
                "score": 0.5,
            }
        ],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({**document, **changes}), encoding="utf-8")
    return path


def test_attributes_of_other_writers_are_kept(tmp_path: Path) -> None:
    box = {"image_id": 5, "category_id": 18, "bbox": [1, 2, 3, 4]}
    path = write(tmp_path, annotations=[{**box, "attributes": {"truncated": True}}, {**box, "attributes": ["red"]}])
    (image,) = read_coco(path)
    assert [region.attributes for region in image.regions] == [{"truncated": True}, {"attributes": ["red"]}]


def test_the_shapes_of_an_annotation(tmp_path: Path) -> None:
    path = write(tmp_path)
    box = Region.box(1, 2, 11.5, 22, "dog", 0.5)
    polygons = (
        Region.polygon([(1, 2), (11, 2), (6, 22)], "dog", 0.5, identity=7),
        Region.polygon([(0, 0), (1, 0), (1, 1)], "dog", 0.5, identity=7),
    )
    points = (Region.point(3, 4, "nose", 0.5, identity=7),)
    for shape, expected in {"box": (box,), "polygon": polygons, "keypoints": points, "auto": points}.items():
        assert read_coco(path, shape) == [ImageRegions("a.png", 40, 30, expected)]


ENTRY = {"id": 7, "image_id": 5, "category_id": 18, "bbox": [1, 2, 10.5, 20]}


def test_what_is_there_decides(tmp_path: Path) -> None:
    outline = {**ENTRY, "segmentation": [[1, 2, 11, 2, 6, 22]], "keypoints": [0, 0, 0], "num_keypoints": 0}
    (image,) = read_coco(write(tmp_path, annotations=[outline]))
    assert image.regions == (Region.polygon([(1, 2), (11, 2), (6, 22)], "dog"),)
    crowd = {**ENTRY, "segmentation": {"counts": [3, 4], "size": [30, 40]}, "iscrowd": 1}
    path = write(tmp_path, annotations=[crowd])
    assert read_coco(path, crowds="keep")[0].regions == (Region.box(1, 2, 11.5, 22, "dog"),)
    with pytest.raises(
        ValueError, match=r"`annotations\[0\]`: `segmentation` must be a list .* got a run-length encoded mask"
    ):
        read_coco(path, "polygon", crowds="keep")


def test_crowds_are_skipped_unless_asked_for(tmp_path: Path) -> None:
    crowd = {**ENTRY, "id": 8, "bbox": [0, 0, 40, 30], "iscrowd": 1}
    path = write(tmp_path, annotations=[{**ENTRY, "iscrowd": 0}, crowd])
    box, group = Region.box(1, 2, 11.5, 22, "dog"), Region.box(0, 0, 40, 30, "dog")
    assert read_coco(path)[0].regions == read_coco(path, crowds="skip")[0].regions == (box,)
    assert read_coco(path, crowds="keep")[0].regions == (box, group)
    message = r"coco\.json: `annotations\[1\]` is a crowd \(`iscrowd` is 1\); crowds='skip' omits it, 'keep' reads it"
    with pytest.raises(ValueError, match=message):
        read_coco(path, crowds="raise")
    with pytest.raises(ValueError, match="`crowds` must be one of 'skip', 'keep', 'raise', got True"):
        read_coco(path, crowds=True)  # type: ignore[arg-type]


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path)
    expected, content = read_coco(path), path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert read_coco(path) == expected
    path.write_bytes(b"\xef\xbb\xbf\xef\xbb\xbf" + content)
    with pytest.raises(ValueError, match=r"coco\.json: Not valid JSON"):
        read_coco(path)


def test_annotations_without_ids_are_read(tmp_path: Path) -> None:
    bare = {key: value for key, value in ENTRY.items() if key != "id"}
    assert len(read_coco(write(tmp_path, annotations=[bare, bare]))[0].regions) == 2


@pytest.mark.parametrize("wrong", ["7", -1, 1.0, True, None, [5]])
def test_ids_are_integers_everywhere(tmp_path: Path, wrong: Any) -> None:
    broken = {
        r"images\[0\]`: `id`": {"images": [{**IMAGE, "id": wrong}]},
        r"categories\[0\]`: `id`": {"categories": [{"id": wrong, "name": "dog"}]},
        r"annotations\[0\]`: `id`": {"annotations": [{**ENTRY, "id": wrong}]},
        r"annotations\[0\]`: `image_id`": {"annotations": [{**ENTRY, "image_id": wrong}]},
        r"annotations\[0\]`: `category_id`": {"annotations": [{**ENTRY, "category_id": wrong}]},
    }
    for place, changes in broken.items():
        with pytest.raises(ValueError, match=rf"coco\.json: `{place} must be an integer of at least 0, got "):
            read_coco(write(tmp_path, **changes))


def test_bad_polygons_and_crowds_are_counted(tmp_path: Path) -> None:
    good, crowd = [1, 2, 11, 2, 6, 22], {**ENTRY, "iscrowd": 1}
    entries = [{**ENTRY, "segmentation": [good, [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]}, {**crowd, "id": 8}]
    path = write(tmp_path, annotations=entries)
    message = (
        r"`annotations\[0\]`: `segmentation\[1\]` must be a polygon with x and y of at least 3 points, got 4 numbers"
    )
    with pytest.raises(ValueError, match=message):
        read_coco(path)
    images = read_coco(path, polygons="skip")
    assert [region.points for region in images[0].regions] == [((1, 2), (11, 2), (6, 22))]
    assert images.skipped == {"crowds": 1, "polygons": 2}
    assert read_coco(path, "box").skipped == {"crowds": 1, "polygons": 0}
    assert read_coco(path, "box", crowds="keep").skipped == {"crowds": 0, "polygons": 0}
    with pytest.raises(ValueError, match="`polygons` must be one of 'raise', 'skip', got 'keep'"):
        read_coco(path, polygons="keep")


def test_the_whole_file_is_checked_whatever_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, annotations=[{**ENTRY, "segmentation": [[1, 2, "a"]]}])
    with pytest.raises(ValueError, match=r"`segmentation` must be a list of polygons, .* got \[\[1, 2, 'a'\]\]"):
        read_coco(path, "box")
    path = write(tmp_path, annotations=[{**ENTRY, "bbox": [0] * 8, "segmentation": [[1, 2, 3, 4, 5, 6]]}])
    with pytest.raises(ValueError, match=r"`bbox` must be a list of 4 numbers \(.*; 8 numbers of a quad belong into"):
        read_coco(path, "polygon")


def mutate(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with one part of it changed."""
    odd = [
        None,
        True,
        -1,
        0,
        1.5,
        "",
        "a",
        [],
        {},
        [1],
        10**400,
        1e308,
        [[]],
        {"a": 1},
        [1, 2, 3, 4, 5, 6, 7, 8],
        "\u0663",
    ]
    if not isinstance(value, (list, dict)) or not value or rng.random() < 0.15:
        return rng.choice(odd)
    copied = copy.copy(value)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    action = rng.random()
    if action < 0.15:
        del copied[key]
    elif action < 0.25 and isinstance(value, list):
        copied.append(copied[key])
    else:
        copied[key] = mutate(rng, copied[key])
    return copied


PLACE = re.compile(
    r"`(images|categories|annotations)(\[\d+\]`(: `[a-z_]+(\[\d+\])?`)?|`) (must|is) "
    "|Expected a JSON object|Not valid JSON|Key .* occurs twice|NaN is not|A string contains half"
)


def read_message(path: Path, **options: str) -> str:
    """Return the message of the error that reading raises, or ""."""
    try:
        read_coco(path, **options)
    except ValueError as error:
        return str(error)
    return ""


def test_mutated_files_give_regions_or_the_documented_error(tmp_path: Path) -> None:
    """Messages name the file and the place, and are never those of Python."""
    rng, valid = random.Random(0), json.loads(write(tmp_path).read_text(encoding="utf-8"))
    path, messages = tmp_path / "mutated.json", []
    for _ in range(600):
        document = valid
        for _ in range(rng.randint(1, 3)):
            document = mutate(rng, document)
        text = json.dumps(document)
        if rng.random() < 0.1:
            start = rng.randrange(len(text))
            text = text[:start] + rng.choice(["", "}", '"', "NaN", "\\ud800"]) + text[start + rng.randrange(3) :]
        path.write_text(text, encoding="utf-8")
        for shape in ("auto", "box", "polygon", "keypoints"):
            messages.append(read_message(path, shape=shape, crowds=rng.choice(("skip", "keep", "raise"))))
    raised = [message for message in messages if message]
    assert 100 < len(raised) < len(messages) - 100
    for message in raised:
        assert message.startswith(f"{path}: ")
        assert PLACE.match(message.removeprefix(f"{path}: ")), message


def test_an_area_counts_pixels(tmp_path: Path) -> None:
    corners = [(2, 1), (30, 3), (25, 28), (4, 20)]
    given = (Region.polygon(corners), Region.box(1, 2, 4, 8), Region.point(3, 3))
    write_coco([ImageRegions("a", 40, 30, given)], tmp_path / "a.json")
    areas = [entry["area"] for entry in json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["annotations"]]
    y, x = (np.mgrid[0:300, 0:400] + 0.5) / 10
    pixels = inside_polygon(np.stack([x.ravel(), y.ravel()], axis=1), corners).sum() / 100
    assert areas[0] == pytest.approx(pixels, rel=5e-3)
    assert areas[1:] == [18, 0]


IMAGE = {"id": 5, "file_name": "a.png", "width": 40, "height": 30}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, r"coco\.json: `images` must be a list, got None\.$"),
        (
            {"images": [{**IMAGE, "id": 4}, IMAGE, IMAGE]},
            r"coco\.json: `images\[2\]`: `id` must be unique, got 5, which `images\[1\]` has too\.$",
        ),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 18, "name": "dog"}, {"id": 1, "name": "b"}]},
            r"coco\.json: `categories\[2\]`: `id` must be unique, got 1, which `categories\[0\]` has too\.$",
        ),
        (
            {"annotations": [ENTRY, ENTRY]},
            r"coco\.json: `annotations\[1\]`: `id` must be unique, got 7, which `annotations\[0\]`",
        ),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 1.0, "name": "b"}]},
            r"`categories\[1\]`: `id` must be an integer of at least 0, got 1\.0",
        ),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": True, "name": "b"}]},
            r"`categories\[1\]`: `id` must be an integer of at least 0, got True\.$",
        ),
        ({"images": [{**IMAGE, "id": [5]}]}, r"`images\[0\]`: `id` must be an integer of at least 0, got \[5\]"),
        ({"images": [{}]}, r"`images\[0\]`: `id` is missing; expected an integer"),
        ({"images": [5]}, r"`images\[0\]` must be an object, got 5"),
        ({"categories": {}}, r"`categories` must be a list, got {}"),
        (
            {"annotations": [{**ENTRY, "id": False}]},
            r"`annotations\[0\]`: `id` must be an integer of at least 0, got False",
        ),
        (
            {"annotations": [{**ENTRY, "image_id": True}]},
            r"`annotations\[0\]`: `image_id` must be an integer of at least 0, got True",
        ),
        (
            {"annotations": [{**ENTRY, "category_id": None}]},
            r"`annotations\[0\]`: `category_id` must be an integer of at least 0, got None",
        ),
        ({"annotations": [{**ENTRY, "iscrowd": 2}]}, r"`annotations\[0\]`: `iscrowd` must be 0 or 1, got 2"),
        (
            {"images": [{"id": 5, "file_name": "a.png", "width": 40}]},
            r"`images\[0\]`: `height` is missing; expected an integer of at least 1",
        ),
        ({"images": [{**IMAGE, "width": -1}]}, "`width` must be an integer of at least 1, got -1"),
        (
            {"annotations": [{**ENTRY, "image_id": 6}]},
            r"`annotations\[0\]`: `image_id` must be the id of one of the images, got 6",
        ),
        (
            {"annotations": [ENTRY, {**ENTRY, "id": 8, "category_id": 1}]},
            r"`annotations\[1\]`: `category_id` must be the id of one of the categories, got 1",
        ),
        (
            {"annotations": [{**ENTRY, "bbox": [1, 2, -3, 4]}]},
            r"`annotations\[0\]`: `bbox` must be a box with a width and height of at least 0, got \[1, 2, -3, 4\]",
        ),
        (
            {"annotations": [{**ENTRY, "bbox": [1, 2, 3]}]},
            r"`annotations\[0\]`: `bbox` must be a list of 4 finite numbers \(x, y, .*\), got \[1, 2, 3\]\.$",
        ),
        ({"annotations": [{**ENTRY, "bbox": []}]}, r"`bbox` must be a list of 4 finite numbers .*, got \[\]"),
        (
            {"annotations": [{**ENTRY, "bbox": [1, 2, "a", 3]}]},
            r"`bbox` must be a list of 4 finite numbers .*, got \[1, 2, 'a', 3\]",
        ),
        (
            {"annotations": [{**ENTRY, "segmentation": [[1, 2, 3]]}]},
            r"`segmentation\[0\]` must be a polygon with x and y of at least 3 points, got 3 numbers",
        ),
        (
            {"annotations": [{**ENTRY, "segmentation": [[1, 2, 3, 4]]}]},
            r"`annotations\[0\]`: `segmentation\[0\]` must be a polygon .* at least 3 points, got 4 numbers",
        ),
        (
            {"annotations": [{**ENTRY, "keypoints": [1, 2, 3]}]},
            r"`keypoints` must have 2 points, as many as its category, got 1",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_coco(write(tmp_path, **changes))


def test_invalid_files_and_arguments_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which does not exist"):
        read_coco(tmp_path / "none.json")
    with pytest.raises(ValueError, match="`shape` must be one of 'auto', 'box', 'polygon', 'keypoints', got 'mask'"):
        read_coco(write(tmp_path), "mask")
    with pytest.raises(ValueError, match=r"`annotations\[0\]`: `segmentation` is missing; shape='polygon' reads it"):
        read_coco(write(tmp_path, annotations=[ENTRY]), "polygon")
    (tmp_path / "text.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.json: Not valid JSON"):
        read_coco(tmp_path / "text.json")


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Region.line([(0, 0), (1, 1)]), r"Image 'a': `regions\[0\]` must be a box, quad, polygon or point of image 0"),
        (Region.track([(0, 0)], [0]), "must be a box"),
        (Region.point(0, 0, image=1), "of image 0"),
        (Region.point(0, 0, ""), "must not have an empty label"),
    ],
)
def test_what_coco_cannot_hold(tmp_path: Path, region: Region, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_coco([ImageRegions("a", 5, 5, (region,))], tmp_path / "a.json")


def test_corners_that_no_width_leads_to_come_back_exactly(tmp_path: Path) -> None:
    box = Region.box(1.626103033162508, 0.0, 32770.248985564576, 3.0)
    (x1, _), (x2, _) = box.points
    assert x1 + (x2 - x1) != x2
    listed = [ImageRegions("a.png", 40000, 7, [box])]
    write_coco(listed, tmp_path / "a.json")
    assert read_coco(tmp_path / "a.json") == listed
