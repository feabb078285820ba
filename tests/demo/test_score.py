"""The demo's figures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vlparts.demo.score import read_answers, score

BOX = [10.0, 20.0, 30.0, 60.0]


def items(tmp_path: Path, *answers: str) -> list[dict]:
    Image.new("RGB", (100, 200)).save(tmp_path / "image.png")
    turns = [
        {"role": "user", "content": "Where is the 7?"},
        {"role": "assistant", "content": [{"label": "7", "box": BOX}]},
    ]
    line = json.dumps({"image": "image.png", "messages": turns}) + "\n"
    (tmp_path / "asked.jsonl").write_text(line * len(answers), encoding="utf-8")
    return read_answers(tmp_path / "asked.jsonl", list(answers))


def test_a_right_answer() -> None:
    from vlparts.coordinates.codec import encode
    from vlparts.coordinates.regions import Region

    assert encode([Region.box(*BOX, "7")], (100, 200)) == "7 (100,100),(300,300)"


def test_figures(tmp_path: Path) -> None:
    figures = score(items(tmp_path, "7 (100,100),(300,300)", "3 (100,100),(300,300)", "7 (600,100),(800,300)", "no"))
    assert figures.count == 4
    assert figures.well_formed == 0.75
    assert figures.right_label == 0.5
    assert figures.mean_iou == pytest.approx(0.5, abs=0.01)
    assert figures.iou_above_half == 0.5
    assert 0 < figures.mean_iou_of_constant < 0.5


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "7",
        "7 (100,100)",
        "7 (300,100),(100,300)",
        "7 (100,100),(300,300) and",
        "7 (100,100),(300,300)\n7 (100,100),(300,300)",
        "7 (100, 100), (300, 300)",
        "7 (100,100),(300,30",
    ],
)
def test_anything_but_one_box_is_not_well_formed(tmp_path: Path, answer: str) -> None:
    (item,) = items(tmp_path, answer)
    assert item["predicted"] is None
    assert score([item]).mean_iou == 0.0
