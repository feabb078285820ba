"""Pictures: what is drawn, that files are readable, and that nothing global is touched."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from PIL import Image

from vlparts import show
from vlparts.coordinates.regions import Region

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
BOX = Region.box(5, 10, 30, 35, "cat", score=0.5)
TRUE_BOX = Region.box(6, 9, 31, 36, "cat")
POINT = Region.point(50, 20, "tip")


def assert_readable(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 150
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_boxes_are_drawn_where_they_are() -> None:
    ax = show.boxes(IMAGE, [BOX, POINT], truth=[TRUE_BOX], title="one")
    truth, predicted = ax.patches
    assert isinstance(predicted, Rectangle)
    assert predicted.get_bbox().extents.tolist() == list(BOX.xyxy)
    assert isinstance(truth, Rectangle)
    assert truth.get_bbox().extents.tolist() == list(TRUE_BOX.xyxy)
    assert (predicted.get_linestyle(), truth.get_linestyle()) == ("-", "--")
    assert predicted.get_edgecolor() != truth.get_edgecolor()
    (dot,) = ax.lines
    assert (dot.get_xdata(), dot.get_ydata()) == ([50.0], [20.0])
    assert [text.get_text() for text in ax.texts] == ["cat", "cat 0.50", "tip"]
    assert ax.get_title() == "one"
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["predicted", "truth"]


CORNERS = [(5.0, 30.0), (20.0, 6.0), (50.0, 12.0), (40.0, 34.0)]


@pytest.mark.parametrize("kind", ["quad", "polygon"])
def test_outlines_are_closed(kind: str) -> None:
    ax = show.boxes(IMAGE, [Region(kind, tuple(CORNERS), "sign")])
    (outline,) = ax.patches
    assert isinstance(outline, Polygon)
    assert outline.get_xy().tolist() == [list(corner) for corner in [*CORNERS, CORNERS[0]]]
    assert not outline.get_fill()
    assert [text.get_text() for text in ax.texts] == ["sign"]


def test_a_line_runs_through_its_points() -> None:
    ax = show.boxes(IMAGE, [], truth=[Region.line(CORNERS, "road")])
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [list(point) for point in CORNERS]
    assert (line.get_linestyle(), line.get_marker()) == ("--", "None")


def test_a_track_ends_in_a_dot(tmp_path: Path) -> None:
    ax = show.boxes(IMAGE, [Region.track(CORNERS, [0, 1, 2, 3]), Region.track(CORNERS[:1], [0])])
    line, end, lone = ax.lines
    assert line.get_xydata().tolist() == [list(point) for point in CORNERS]
    assert end.get_xydata().tolist() == [list(CORNERS[-1])]
    assert lone.get_xydata().tolist() == [list(CORNERS[0])]
    assert line.get_markersize() < end.get_markersize() == lone.get_markersize()
    ax.figure.savefig(tmp_path / "track.png")
    assert_readable(tmp_path / "track.png")


def test_pixel_edges_are_whole_numbers() -> None:
    ax = show.boxes(IMAGE, [Region.box(0, 0, 60, 40)])
    assert tuple(ax.images[0].get_extent()) == (0, 60, 40, 0)
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 60), (40, 0))


def test_without_truth_there_is_no_legend() -> None:
    ax = show.boxes(IMAGE, [BOX])
    assert ax.get_legend() is None
    assert len(ax.patches) == 1


def test_boxes_draws_into_given_axes(tmp_path: Path) -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert show.boxes(IMAGE, [BOX], ax=right) is right
    assert (len(left.patches), len(right.patches)) == (0, 1)
    figure.savefig(tmp_path / "two.png")
    assert_readable(tmp_path / "two.png")


@pytest.mark.parametrize("label", ["cat", "tip"])
@pytest.mark.parametrize("x", [0, 25, 50])
@pytest.mark.parametrize("y", [0, 15, 30])
def test_labels_stay_in_the_picture(x: int, y: int, label: str) -> None:
    regions = [Region.box(x, y, x + 10, y + 10, label)]
    ax = show.boxes(np.zeros((40, 60)), regions, truth=regions)
    ax.figure.canvas.draw()
    frame = ax.get_window_extent()
    for text in ax.texts:
        extent = text.get_window_extent()
        assert frame.x0 - 1 <= extent.x0
        assert extent.x1 <= frame.x1 + 1
        assert frame.y0 - 1 <= extent.y0
        assert extent.y1 <= frame.y1 + 1


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 9), dtype=np.uint8),
        np.zeros((8, 9, 1)),
        np.ones((8, 9, 3), dtype=np.float32),
        np.zeros((8, 9, 4), dtype=np.uint8),
        np.zeros((8, 9), dtype=bool),
        Image.new("L", (9, 8)),
        Image.new("P", (9, 8)),
        Image.new("CMYK", (9, 8)),
        Image.new("1", (9, 8)),
    ],
    ids=lambda image: f"{type(image).__name__}-{getattr(image, 'mode', None) or image.dtype}",
)
def test_images_of_many_kinds_are_drawn(image: Any) -> None:
    ax = show.boxes(image, [])
    ax.figure.canvas.draw()
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 9), (8, 0))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 8, 9)), r"`image` must have shape \(H, W\) or \(H, W, 1, 3 or 4\), got \(3, 8, 9\)"),
        (np.zeros((0, 9)), "`image` must have shape"),
        (np.full((8, 9, 3), 2.0), r"`image` of floats must be in \[0, 1\], got 2\.\.2"),
        (np.full((8, 9, 3), np.nan), "`image` of floats must be in"),
        (np.zeros((8, 9), dtype=np.int64), r"`image` must be uint8 or floats in \[0, 1\], got int64"),
    ],
)
def test_bad_images_are_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        show.boxes(image, [])


def test_bad_regions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`regions\[0\]` must be a Region, got tuple"):
        show.boxes(IMAGE, [(1, 2, 3, 4)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`truth` must be an iterable of Region, got Region"):
        show.boxes(IMAGE, [], truth=BOX)  # type: ignore[arg-type]


def test_a_grid_holds_one_picture_per_item(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    items = [dict(image=IMAGE, predicted=[BOX] * count, title=str(count)) for count in range(5)]
    items[2]["truth"] = [TRUE_BOX]
    figure = show.box_grid(items, path, columns=3)
    assert [len(ax.patches) for ax in figure.axes] == [0, 1, 3, 3, 4]
    assert [ax.get_title() for ax in figure.axes] == ["0", "1", "2", "3", "4"]
    assert len(figure.legends) == 1
    rows = {round(ax.get_position().y0, 3) for ax in figure.axes}
    assert len(rows) == 2
    assert_readable(path)


def test_a_grid_of_one_has_no_empty_cells() -> None:
    figure = show.box_grid([dict(image=IMAGE)])
    assert len(figure.axes) == 1
    assert figure.legends == []


@pytest.mark.parametrize(
    ("items", "columns", "message"),
    [
        ([], 4, "`items` must have at least one entry, got none"),
        ([dict(image=IMAGE)], 0, "`columns` must be an integer of at least 1, got 0"),
        ([dict(image=IMAGE), dict(predicted=[])], 4, r"`items\[1\]` must have 'image'"),
        ([dict(image=IMAGE, boxes=[])], 4, r"`items\[0\]` must have 'image' .* got \['boxes', 'image'\]"),
    ],
)
def test_bad_grids_are_refused(items: Any, columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        show.box_grid(items, columns=columns)


def test_a_plan_is_drawn_as_bars(tmp_path: Path) -> None:
    plan, lengths, path = [[0, 2], [1], [3]], [30, 90, 50, 100], tmp_path / "plan.png"
    figure = show.packing_plan(plan, lengths, 100, path=path)
    (ax,) = figure.axes
    items, padding = ax.containers
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in items]
    np.testing.assert_allclose(bars, [(0, 0, 30), (0, 30, 50), (1, 0, 90), (2, 0, 100)])
    ends = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in padding]
    np.testing.assert_allclose(ends, [(0, 80, 20), (1, 90, 10)])
    assert all(bar.get_hatch() for bar in padding)
    assert not any(bar.get_hatch() for bar in items)
    assert ax.get_title(loc="left") == "4 items in 3 bins of 100: 10.0% padding"
    assert [text.get_text() for text in ax.texts] == ["30", "50", "90", "100"]
    assert_readable(path)


def test_sizes_are_written_where_there_is_room() -> None:
    figure = show.packing_plan([[0, 1]], [990, 10], 1000)
    assert [text.get_text() for text in figure.axes[0].texts] == ["990"]


def test_a_full_plan_and_an_item_past_the_capacity() -> None:
    (ax,) = show.packing_plan([[0], [1]], [100, 150], 100).axes
    assert len(ax.containers[1]) == 0
    assert ax.get_xlim()[1] >= 150
    assert ax.get_title(loc="left").endswith("0.0% padding")


def test_plans_may_be_long_or_hold_empty_bins() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 600).tolist()
    plan = [[], *([2 * index, 2 * index + 1] for index in range(300))]
    figure = show.packing_plan(plan, lengths, 100)
    figure.canvas.draw()
    assert len(figure.axes[0].containers[0]) == 600
    assert figure.get_size_inches()[1] <= 14


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "`plan` must have at least one bin, got none"),
        ([[0], [3]], r"`plan\[1\]` must have items in 0\.\.2, got 3"),
        ([[-1]], r"`plan\[0\]` must have items in 0\.\.2, got -1"),
        ([[0, 1], [0]], r"`plan\[1\]` has item 0, which is already in the plan"),
        ([[0, 1, 2]], r"`plan\[0\]` has length 60, which exceeds `capacity`=50"),
    ],
)
def test_bad_plans_are_refused(plan: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        show.packing_plan(plan, [10, 20, 30], 50)


def test_pictures_touch_nothing_global(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    show.boxes(IMAGE, [BOX], truth=[TRUE_BOX])
    show.packing_plan([[0]], [1], 2)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("draw", [lambda: show.boxes(IMAGE, []), lambda: show.packing_plan([[0]], [1], 2)])
def test_without_matplotlib_the_message_says_what_to_install(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'vlparts\[show\]'"):
        draw()
