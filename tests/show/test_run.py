"""The picture of a training run: what is drawn of which log, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.show.test_boxes import assert_readable
from vlparts import show
from vlparts.run_log import RECIPE, write_log

SHARES = {"speed/data_wait": 0.1, "packing/fill": 0.9}


def entries(count: int, **fields: float) -> list[dict[str, Any]]:
    """A log with an entry every 10 steps, whose loss falls, and one evaluation."""
    rows = [
        {"loss": 3 - index / count, "grad_norm": 1.0, "learning_rate": 1e-3, **fields, "step": 10 * (index + 1)}
        for index in range(count)
    ]
    return [*rows, {"eval_loss": 2.5, "step": 10 * count}]


def axes_of(figure: Any) -> dict[str, Any]:
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def test_a_run_is_drawn(tmp_path: Path) -> None:
    by_length = {f"loss_by_length/{name}": 1.0 for name in ("257+", "1-16", "17-64")}
    by_task = {"loss_by_task/b": 1.0, "loss_by_task/a": 2.0}
    write_log(tmp_path, entries(4, **by_length, **by_task, **SHARES))
    figure = show.run(tmp_path, tmp_path / "run.png")
    found = axes_of(figure)
    assert [*found] == [
        "loss",
        "loss by task",
        "loss by answer length in tokens",
        "learning rate",
        "gradient norm",
        "packs filled, time waiting for data",
    ]
    training, evaluation = found["loss"].lines
    np.testing.assert_allclose(training.get_xydata(), [(10, 3), (20, 2.75), (30, 2.5), (40, 2.25)])
    np.testing.assert_allclose(evaluation.get_xydata(), [(40, 2.5)])
    labels = {
        title: [text.get_text() for text in ax.get_legend().get_texts()]
        for title, ax in found.items()
        if ax.get_legend()
    }
    assert labels["loss"] == ["training", "evaluation"]
    assert labels["loss by task"] == ["b", "a"]
    assert labels["loss by answer length in tokens"] == ["1-16", "17-64", "257+"]
    assert figure.get_suptitle() == f"{tmp_path.name}: 40 optimizer steps"
    assert_readable(tmp_path / "run.png")


def test_a_mean_is_drawn_over_many_values(tmp_path: Path) -> None:
    rows = entries(100)
    for index, row in enumerate(rows[:-1]):
        row["loss"] = 1.0 + index % 2
    write_log(tmp_path, rows)
    values, mean, _ = axes_of(show.run(tmp_path))["loss"].lines
    assert set(values.get_ydata()) == {1.0, 2.0}
    middle = mean.get_ydata()[5:-5]
    assert 1.3 < middle.min() <= middle.max() < 1.7
    assert len(mean.get_ydata()) == 100


def test_stages_follow_one_another(tmp_path: Path) -> None:
    lines = [{"settings": {"stages": ["first", "second"]}}]
    (tmp_path / RECIPE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_log(tmp_path / "first", entries(3))
    write_log(tmp_path / "second", entries(2))
    figure = show.run(tmp_path)
    loss = axes_of(figure)["loss"]
    lines_of_loss = [line.get_xdata().tolist() for line in loss.lines if line.get_label() in ("training", "_")]
    assert [10, 20, 30] in lines_of_loss
    assert [40, 50] in lines_of_loss
    assert [30, 30] in [list(line.get_xdata()) for line in loss.lines]
    assert figure.get_suptitle() == f"{tmp_path.name}: 50 optimizer steps (first 30, second 20)"


def test_a_gradient_norm_of_several_magnitudes_has_a_logarithmic_scale(tmp_path: Path) -> None:
    rows = entries(4)
    write_log(tmp_path / "even", rows)
    rows[0]["grad_norm"] = 100.0
    write_log(tmp_path / "spike", rows)
    scales = [axes_of(show.run(tmp_path / name))["gradient norm"].get_yscale() for name in ("even", "spike")]
    assert scales == ["linear", "log"]


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    rows = entries(3)
    rows[1] |= {"grad_norm": float("nan"), "loss": float("inf"), "speed/data_wait": float("nan")}
    write_log(tmp_path, rows)
    show.run(tmp_path, tmp_path / "run.png")
    assert_readable(tmp_path / "run.png")


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`folder` must be the output of a training run"):
        show.run(tmp_path)
