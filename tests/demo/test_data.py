"""The demo's images and records."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlparts.demo.data import Task, load_sources, write_dataset
from vlparts.training.records import read_records


def test_training_and_held_out_images_share_nothing() -> None:
    from sklearn.datasets import load_digits, load_sample_images

    train_photos, train_digits, train_values = load_sources(held_out=False)
    test_photos, test_digits, test_values = load_sources(held_out=True)
    for whole, ours, theirs in zip(load_sample_images().images, train_photos, test_photos, strict=True):
        np.testing.assert_array_equal(np.concatenate([ours, theirs], 1), whole)
    assert len(train_digits) + len(test_digits) == len(load_digits().images)
    whole = sorted(digit.tobytes() for digit in load_digits().images / 16.0)
    assert sorted(digit.tobytes() for digit in [*train_digits, *test_digits]) == whole
    assert not {digit.tobytes() for digit in train_digits} & {digit.tobytes() for digit in test_digits}
    assert set(train_values) == set(test_values) == set(range(10))


@pytest.mark.parametrize("task", [Task(), Task(digits=1), Task((100, 130), (20, 30), 4)])
def test_every_record_is_valid_and_its_box_holds_the_ink(tmp_path: Path, task: Task) -> None:
    path = write_dataset(tmp_path, "some", 12, task, held_out=False, seed=3)
    shapes = set()
    for line in read_records(path).lines:
        image = np.asarray(Image.open(tmp_path / line.record.image))
        height, width = image.shape[:2]
        shapes.add((height, width))
        assert task.sides[0] <= min(height, width) <= max(height, width) <= task.sides[1]
        block = line.record.messages[1].content[0]
        left, top, right, bottom = (int(edge) for edge in block.box)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert max(right - left, bottom - top) <= task.digit_sides[1]
        assert image[top:bottom, left:right].min(-1).max() > 200
        assert line.record.messages[0].content[0].text == f"Where is the {block.label}?"
    assert len(shapes) > 5


def test_a_set_depends_on_its_seed_alone(tmp_path: Path) -> None:
    first, again, other = (
        write_dataset(tmp_path / name, "some", 3, Task(), held_out=True, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.read_text(encoding="utf-8") == again.read_text(encoding="utf-8")
    assert first.read_text(encoding="utf-8") != other.read_text(encoding="utf-8")
    for line in first.read_text(encoding="utf-8").splitlines():
        name = json.loads(line)["image"]
        assert (first.parent / name).read_bytes() == (again.parent / name).read_bytes()
