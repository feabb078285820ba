"""The picture of routers' load: what is drawn, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.show.test_boxes import assert_readable
from vlparts import show
from vlparts.moe.statistics import RouterStatistics


def statistics(layers: int = 3, experts: int = 8, groups: int = 4, tokens: int = 50) -> list[RouterStatistics]:
    """Statistics of layers whose last expert is never chosen."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(layers):
        found.append(RouterStatistics(experts, groups))
        for _ in range(2):
            found[-1].update(torch.rand(tokens, experts - 1, generator=generator).argsort(dim=1)[:, :2])
    return found


def test_loads_and_scores_are_drawn(tmp_path: Path) -> None:
    layers, path = statistics(), tmp_path / "load.png"
    figure = show.router_load(layers, path)
    grid, side, colours = figure.axes
    loads = [layer.compute() for layer in layers]
    relative = [load.tokens_per_expert / load.tokens_per_expert.double().mean() for load in loads]
    np.testing.assert_allclose(grid.images[0].get_array(), torch.stack(relative).numpy())
    assert [line.get_xdata()[0] for line in grid.lines] == [1.5, 3.5, 5.5]
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in side.patches]
    np.testing.assert_allclose(bars, [(row, load.batch_imbalance_score) for row, load in enumerate(loads)])
    assert any(load.batch_imbalance_score > load.imbalance_score for load in loads)
    assert grid.get_ylim() == side.get_ylim() == (2.5, -0.5)
    assert (grid.get_xlabel(), grid.get_ylabel(), side.get_xlabel()) == ("expert", "layer", "imbalance score")
    assert colours.get_ylabel() == "load / mean"
    assert grid.get_title(loc="left") == "3 layers, 8 experts, 3 of them dead"
    assert_readable(path)


def test_computed_loads_draw_the_same() -> None:
    layers = statistics()
    pictures = [
        show.router_load(value).axes[0].images[0].get_array() for value in (layers, [x.compute() for x in layers])
    ]
    np.testing.assert_array_equal(*pictures)


def test_many_layers_and_experts_fit() -> None:
    figure = show.router_load(statistics(layers=61, experts=256, groups=8))
    figure.canvas.draw()
    assert figure.get_size_inches()[0] <= 16
    assert figure.get_size_inches()[1] <= 14


def test_one_layer_and_one_group_have_no_lines() -> None:
    figure = show.router_load(statistics(layers=1, groups=1))
    assert len(figure.axes[0].lines) == 0
    assert figure.axes[1].patches[0].get_width() == 0


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "`statistics_per_layer` must have at least one layer, got none"),
        ([torch.zeros(3)], r"`statistics_per_layer\[0\]` must be RouterStatistics or RouterLoad, got Tensor"),
        (
            [*statistics(1), *statistics(1, groups=2)],
            r"`statistics_per_layer\[1\]` must have \(8, 4\) experts and groups as the first, got \(8, 2\)",
        ),
        ([*statistics(1), RouterStatistics(8, 4)], r"`statistics_per_layer\[1\]` must have seen tokens, got none"),
    ],
)
def test_bad_layers_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        show.router_load(layers)


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'vlparts\[show\]'"):
        show.router_load(statistics(1))
