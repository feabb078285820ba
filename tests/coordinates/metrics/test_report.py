"""Metrics of a report, compared with values by hand and with plain loops."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlparts.coordinates.codec import encode
from vlparts.coordinates.formats.openpangu import padded_format
from vlparts.coordinates.metrics.iou import box_iou
from vlparts.coordinates.metrics.report import Detection, Report, report
from vlparts.coordinates.regions import Region

SIZE = (999, 999)  # a code is a pixel in openPangu's format
TRUE = Region.box(100, 100, 200, 200, "cat")


def of(*cases: tuple[str, list[Region]], **options: Any) -> Report:
    texts, truths = zip(*cases, strict=True)
    return report(texts, truths, [SIZE] * len(cases), **options)


def test_accuracy_is_above_half_of_the_first_region() -> None:
    half = "(100,100),(150,200)"
    more = "(100,100),(151,200)"
    assert of((half, [TRUE])).accuracy == 0
    assert of((half, [TRUE]), half_counts=True).accuracy == 1
    assert of((more, [TRUE])).accuracy == 1
    assert of((f"dog {more}", [TRUE])).accuracy == 1
    assert of((f"(900,900),(901,901)\n{more}", [TRUE])).accuracy == 0
    assert of((half, [TRUE])).mean_iou == pytest.approx(0.5)


def test_an_answer_without_a_region_is_wrong() -> None:
    got = of(("I see a cat.", [TRUE]), ("(100,100),(200,200)", [TRUE]))
    assert (got.accuracy, got.mean_iou, got.pointing) == (0.5, 0.5, 0.5)
    assert (got.single, got.regions_read, got.regions_true) == (2, 1, 2)


def test_pointing_is_inside_the_mask() -> None:
    ring = Region.polygon(
        [(100, 100), (160, 100), (160, 160), (140, 160), (140, 120), (120, 120), (120, 160), (100, 160)]
    )
    for text, inside in {"(110,150)": 1, "(130,150)": 0, "(100,100)": 1, "(099,100)": 0}.items():
        got = of((text, [ring]))
        assert got.pointing == inside
        assert got.mean_iou == 0
    assert of(("(120,100),(140,119)", [ring])).pointing == 1  # the middle of a box
    assert of(("(130,140),(134,150)", [ring])).pointing == 0


def test_the_first_three_numbers_need_one_true_area() -> None:
    got = of(("(100,100)", [Region.point(100, 100)]), ("(100,100)", [TRUE, TRUE]), ("", []))
    assert (got.single, got.accuracy, got.mean_iou, got.pointing) == (0, None, None, None)


def test_counting() -> None:
    box = "(100,100),(200,200)"
    got = of((box, [TRUE]), (f"{box}\n{box}", [TRUE]), ("none", [TRUE] * 3), ("", []))
    assert (got.count_exact, got.count_near, got.count_error) == (0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("text", "adheres", "readable"),
    [
        ("(100,100),(200,200)", True, True),
        (" cat (100,100),(200,200)\n", True, True),
        ("cat (100,100),(200,200)\ndog (001,002)", True, True),
        ("cat (100,100),(200,200).", False, True),
        ("cat  (100,100),(200,200)", False, True),
        ("(100,100),(200,200) and (1,2)", False, False),
        ("(200,100),(100,200)", False, False),
        ("no region", False, True),
        ("", False, True),
    ],
)
def test_adherence(text: str, adheres: bool, readable: bool) -> None:
    got = of((text, [TRUE]))
    assert (got.adherence, got.readable) == (adheres, readable)
    assert got.errors == (0 if readable else 1)


def test_an_empty_answer_adheres_where_there_is_nothing() -> None:
    assert of(("", [])).adherence == 1
    assert of(("nothing", [])).adherence == 0


def test_detection_pairs_each_region_once() -> None:
    text = "cat (100,100),(200,200)\ncat (100,100),(190,200)\ndog (500,500),(600,600)"
    truth = [TRUE, Region.box(500, 500, 600, 560, "dog"), Region.box(1, 1, 2, 2, "dog")]
    got = of((text, truth), ("", []), thresholds=[0.5, 0.75])
    assert got.detection == (
        Detection(0.5, 2 / 3, 2 / 3, 2 / 3),
        Detection(0.75, 1 / 3, 1 / 3, 1 / 3),
    )


def test_labels_must_agree_unless_told_otherwise() -> None:
    assert of(("dog (100,100),(200,200)", [TRUE])).detection[0].f1 == 0
    assert of(("dog (100,100),(200,200)", [TRUE]), labels=False).detection[0].f1 == 1
    assert of(("cat (150,150)", [TRUE])).detection[1].f1 == 1


corners = st.lists(st.integers(0, 60), min_size=4, max_size=4).map(
    lambda v: (min(v[:2]), min(v[2:]), max(v[:2]), max(v[2:]))
)
boxes = corners.map(lambda box: Region.box(*box))
cases = st.lists(st.tuples(st.lists(boxes, max_size=3), st.lists(boxes, max_size=3)), min_size=1, max_size=4)


@given(cases)
def test_against_plain_loops(listed: list[tuple[list[Region], list[Region]]]) -> None:
    got = of(*((encode(said, SIZE), truth) for said, truth in listed))
    single = [(said, truth[0]) for said, truth in listed if len(truth) == 1]
    ious = [float(box_iou([said[0].xyxy], [true.xyxy])[0, 0]) if said else 0.0 for said, true in single]
    assert got.mean_iou == (pytest.approx(sum(ious) / len(ious)) if ious else None)
    assert got.accuracy == (sum(iou > 0.5 for iou in ious) / len(ious) if ious else None)
    off = [abs(len(said) - len(truth)) for said, truth in listed]
    assert got.count_error == pytest.approx(sum(off) / len(off))
    assert got.adherence == sum(bool(said) or not truth for said, truth in listed) / len(listed)
    said_count, true_count = (sum(len(case[side]) for case in listed) for side in (0, 1))
    assert (got.regions_read, got.regions_true) == (said_count, true_count)
    for found in got.detection:
        assert (found.precision is None) == (said_count == 0)
        assert (found.recall is None) == (true_count == 0)
        if found.precision and found.recall and found.f1:
            assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))


def test_a_report_is_data_and_readable() -> None:
    got = of(("cat (100,100),(200,200)", [TRUE]))
    fields = json.loads(json.dumps(got.to_dict()))
    assert fields["detection"][0] == {"threshold": 0.5, "precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert fields["accuracy"] == 1.0
    lines = str(got).splitlines()
    assert len(lines) == 13
    assert lines[2].split()[-1] == "100.0%"
    assert lines[-1].endswith("100.0% / 100.0% / 100.0%")


def test_a_report_of_nothing() -> None:
    got = report([], [], [])
    assert (got.answers, got.adherence, got.count_error) == (0, None, None)
    assert str(got).count(" -") >= 9


def test_another_format() -> None:
    fmt = padded_format(label_open="<", label_close=">", separator=";")
    got = of(("<cat>(100,100),(200,200);<cat>(001,001)", [TRUE]), format=fmt)
    assert (got.adherence, got.accuracy, got.regions_read) == (1, 1, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: report("(1,2)", [[]], [SIZE]), "`answers` must be a sequence with one item per answer, got str"),
        (lambda: report([""], 3, [SIZE]), "`truths` must be a sequence"),  # type: ignore[arg-type]
        (lambda: report([""], [[]], []), r"must have the same length, got \[1, 1, 0\]"),
        (lambda: report([3], [[]], [SIZE]), r"`answers\[0\]` must be a str, got int"),  # type: ignore[list-item]
        (lambda: report([""], [TRUE], [SIZE]), r"`truths\[0\]` must be a sequence of Region"),  # type: ignore[list-item]
        (lambda: report([""], [[3]], [SIZE]), r"`truths\[0\]` must be a sequence of Region"),  # type: ignore[list-item]
        (lambda: report([""], [3], [SIZE]), r"`truths\[0\]` must be a sequence of Region"),  # type: ignore[list-item]
        (lambda: report([""], [[]], [(0, 1)]), "`image_size` must be"),
        (lambda: report([""], [[]], [SIZE], "morse"), "`format` must be a CoordinateFormat or one of"),
        (lambda: report([""], [[]], [SIZE], thresholds=[0]), r"`thresholds` must be in \(0, 1\], got \(0,\)"),
        (lambda: report([""], [[]], [SIZE], thresholds=[math.nan]), r"`thresholds` must be in \(0, 1\]"),
    ],
)
def test_bad_arguments_raise(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_reasoning_is_no_part_of_an_answer() -> None:
    answer = "<think>cat (000,000),(001,001) or dog (1,1)</think>\n\ncat (100,100),(200,200)"
    truth = [Region.box(100, 100, 200, 200, "cat")]
    numbers = report([answer], [truth], [(999, 999)])
    assert (numbers.regions_read, numbers.errors, numbers.accuracy, numbers.adherence) == (1, 0, 1.0, 1.0)
    numbers = report([answer], [truth], [(999, 999)], skip_thinking=False)
    assert (numbers.regions_read, numbers.errors, numbers.accuracy, numbers.adherence) == (2, 1, 0.0, 0.0)
    unfinished = report(["<think>cat (100,100),(200,200)"], [truth], [(999, 999)])
    assert (unfinished.regions_read, unfinished.errors, unfinished.count_exact) == (0, 0, 0.0)
