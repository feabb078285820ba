"""Pictures of kept, merged and dropped tokens, and of evaluations."""

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from vlparts import show
from vlparts.evaluation import Evaluation, Interval

GRID = (2, 3)
PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def shown(figure: object, panel: int = 0) -> np.ndarray:
    return figure.axes[panel].images[0].get_array()


def test_tokens_that_are_kept_show_their_pixels() -> None:
    figure = show.kept_tokens(PIXELS, GRID, {"all": range(6)})
    assert np.array_equal(shown(figure), PIXELS)
    assert figure.axes[0].get_title(loc="left") == "all: 6 of 6"
    assert len(figure.axes[0].collections[0].get_segments()) == 0


def test_merged_tokens_show_their_mean_and_a_line_around_them() -> None:
    figure = show.kept_tokens(PIXELS, GRID, {"merged": [0, 0, 1, 2, 0, 3]})
    found = shown(figure).astype(float)
    cells = [PIXELS[:2, :4], PIXELS[2:, 2:4]]
    mean = np.concatenate([cell.reshape(-1, 3) for cell in cells]).mean(0)
    assert np.abs(found[:2, :4] - mean).max() <= 0.5
    assert np.abs(found[2:, 2:4] - mean).max() <= 0.5
    assert np.array_equal(found[:2, 4:], PIXELS[:2, 4:])
    assert figure.axes[0].get_title(loc="left") == "merged: 4 of 6"
    lines = {tuple(map(tuple, line)) for line in figure.axes[0].collections[0].get_segments()}
    assert lines == {((2, 0), (2, 1)), ((1, 1), (1, 2)), ((2, 1), (2, 2)), ((0, 1), (1, 1))}


def test_dropped_tokens_are_pale(tmp_path: Path) -> None:
    figure = show.kept_tokens(PIXELS, GRID, {"a": [-1, 0, 1, 2, 3, 4], "b": [-1] * 5 + [0]}, path=tmp_path / "a.png")
    assert shown(figure)[:2, :2].min() > 220
    assert np.array_equal(shown(figure)[:, 2:], PIXELS[:, 2:])
    assert figure.axes[1].get_title(loc="left") == "b: 1 of 6"
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ({}, "`assignments` must hold at least one entry"),
        ({"a": [0, 1]}, "`assignments['a']` must hold 6 integers of at least -1, got int64 of shape (2,)"),
        ({"a": [0.0] * 6}, "got float64"),
        ({"a": [-2] * 6}, "of at least -1"),
    ],
)
def test_assignments_that_do_not_fit(assignments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        show.kept_tokens(PIXELS, GRID, assignments)


def test_images_of_another_type() -> None:
    with pytest.raises(ValueError, match="`image` must be an RGB image, got float64"):
        show.kept_tokens(PIXELS.astype(float), GRID, {"a": range(6)})


def result(ratio: float, accuracy: Interval | None) -> dict:
    return asdict(
        Evaluation(ratio, 9, 100 * ratio, 120.0, accuracy, Interval(ratio, ratio - 0.1, ratio + 0.05), ratio, 2.0, 3.0)
    )


def test_evaluations_are_drawn_over_tokens(tmp_path: Path) -> None:
    results = [result(ratio, None) for ratio in (1.0, 0.5)]
    figure = show.evaluations(results, path=tmp_path / "a.png")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["mean IoU", "first token, ms", "peak memory, MiB"]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[100.0, 1.0], [50.0, 0.5]]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [1000.0, 500.0]
    both = show.evaluations([result(1.0, Interval(0.5, 0.4, 0.6))])
    assert len(both.axes) == 4
    with pytest.raises(ValueError, match="`results` must hold at least one evaluation"):
        show.evaluations([])
