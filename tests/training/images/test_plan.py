"""What is drawn for an image, and which images are refused."""

import math
from typing import Any

import numpy as np
import pytest

from vlparts import NaViTImageProcessor
from vlparts.parts.image_transforms import fit_to_grid
from vlparts.training.images.plan import ImagePlan, ImagePlanner, ProcessorResolution, checked_sizes
from vlparts.training.images.resolution import ResolutionSampler
from vlparts.training.images.token_drop import BetaDrop, ConstantDrop, ResolutionDrop, kept_count


class Square:
    """A resolution policy without `max_length`: a square of so many blocks."""

    def __init__(self, side: Any) -> None:
        self.side = side

    def grid(self, height: int, width: int, factor: int, generator: np.random.Generator) -> tuple[int, int]:
        return self.side, self.side


class Recorder:
    """A drop policy that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def rate(self, length: int, images_seen: int, generator: np.random.Generator) -> float:
        self.asked.append((length, images_seen))
        return 0.5


def planner(capacity: int = 1000, **options: Any) -> ImagePlanner:
    return ImagePlanner(4, capacity, **options)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (1, 1), (6, 9), (5, 1000)])
def test_without_a_policy_the_image_keeps_its_size_and_patches(height: int, width: int) -> None:
    plan = planner().plan(7, height, width, epoch=2)
    expected = max(1, round(height / 4)), max(1, round(width / 4))
    assert (plan.rows, plan.columns) == expected
    assert plan.kept == math.prod(expected)
    assert plan[:3] == (7, height, width)
    assert plan.epoch == 2
    assert all(type(value) is int for value in plan)


def test_a_plan_depends_on_seed_epoch_and_index_alone() -> None:
    options = {"resolution": ResolutionSampler(16, 80), "token_drop": BetaDrop(0.5, 0.9)}
    one = planner(seed=3, **options)
    plans = {(index, epoch): one.plan(index, 50, 70, epoch) for index in range(20) for epoch in range(3)}
    again = planner(seed=3, **options)
    assert {key: again.plan(key[0], 50, 70, key[1]) for key in reversed(plans)} == plans
    drawn = [plan[3:6] + plan[7:] for plan in plans.values()]
    assert len(set(drawn)) == len(drawn)
    other = planner(seed=4, **options)
    assert all(other.plan(key[0], 50, 70, key[1])[7] != plan.seed for key, plan in plans.items())


def test_policies_are_asked_in_their_units() -> None:
    drop = Recorder()
    plan = planner(merge_size=2, resolution=Square(5), token_drop=drop).plan(0, 9, 9, images_seen=31)
    assert (plan.rows, plan.columns) == (10, 10)
    assert drop.asked == [(100, 31)]  # patches of the full grid
    assert plan.kept == 4 * kept_count(25, 0.5)  # whole blocks


def test_an_image_beyond_the_capacity_is_named_with_its_length() -> None:
    with pytest.raises(ValueError, match=r"Image 3 keeps 36 patches, which exceeds `capacity`=35\. Raise"):
        planner(35, resolution=Square(6)).plan(3, 9, 9)
    with pytest.raises(ValueError, match="Image 3 keeps 18 patches of 36, which exceeds `capacity`=17"):
        planner(17, resolution=Square(6), token_drop=ConstantDrop(0.5)).plan(3, 9, 9)
    assert planner(18, resolution=Square(6), token_drop=ConstantDrop(0.5)).plan(3, 9, 9).kept == 18


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("merge_size", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(400, 400), (100, 1600), (4, 700)])
def test_shrinking_fills_the_capacity_at_the_same_rate(rate: float, merge_size: int, height: int, width: int) -> None:
    block, capacity = merge_size**2, 40
    plan = planner(capacity, merge_size=merge_size, token_drop=ConstantDrop(rate), oversize="shrink").plan(
        0, height, width
    )
    blocks = plan.rows * plan.columns // block
    full = fit_to_grid(height, width, 4 * merge_size, 1, height * width * 4)
    assert plan.kept == block * kept_count(blocks, rate) <= capacity
    whole = full[0] * full[1] // 16
    assert plan.rows * plan.columns <= whole
    if block * kept_count(whole // block, rate) <= capacity:
        assert (plan.rows, plan.columns) == (full[0] // 4, full[1] // 4)
    else:  # one more row and column would be too many
        grown = (plan.rows // merge_size + 1) * (plan.columns // merge_size + 1)
        assert block * kept_count(grown, rate) > capacity


def test_shrinking_leaves_images_that_fit() -> None:
    assert planner(24, oversize="shrink").plan(0, 16, 24) == planner(24).plan(0, 16, 24)


def test_sizes_are_checked_before_training() -> None:
    sizes = np.array([[40, 40], [40, 44], [80, 80]])
    with pytest.raises(ValueError, match="Image 1 keeps 110 patches, which exceeds `capacity`=100"):
        planner(100).check_sizes(sizes)
    with pytest.raises(ValueError, match=r"Image 0 of 9000 x 4 pixels: .*aspect ratio of 2250"):
        planner(100).check_sizes(np.array([[4, 9000]]))
    planner(100, oversize="shrink").check_sizes(sizes)
    planner(100, resolution=Square(2)).check_sizes(sizes)


def test_a_resolution_that_cannot_fit_is_refused_at_once() -> None:
    resolution = ResolutionSampler(8, 40)
    longest = resolution.max_length(4)
    message = f"`resolution` can give images with {longest} kept patches, which exceeds `capacity`={longest - 1}"
    with pytest.raises(ValueError, match=message):
        planner(longest - 1, resolution=resolution)
    with pytest.raises(ValueError, match=message):
        planner(longest - 1, resolution=resolution, token_drop=BetaDrop(0.5, 0.9))
    planner(longest, resolution=resolution)
    planner(longest - 1, resolution=resolution, oversize="shrink")


def test_a_lowest_rate_of_the_drop_policy_counts() -> None:
    class Half(Recorder):
        lowest_rate = 0.5

    resolution = ResolutionSampler(8, 40)
    kept = kept_count(resolution.max_length(4), 0.5)
    planner(kept, resolution=resolution, token_drop=Half())
    with pytest.raises(ValueError, match=f"with {kept} kept patches, which exceeds `capacity`={kept - 1}"):
        planner(kept - 1, resolution=resolution, token_drop=Half())
    planner(50, token_drop=Half()).check_sizes(np.array([[40, 40]]))
    with pytest.raises(ValueError, match="Image 0 keeps 50 patches of 100, which exceeds `capacity`=49"):
        planner(49, token_drop=Half()).check_sizes(np.array([[40, 40]]))


def test_errors_of_policies_name_the_image() -> None:
    drop = ResolutionDrop(0.2, 0.8, 10, 20)
    with pytest.raises(ValueError, match=r"Image 5 of 8 x 12 pixels: `length` must be in 10\.\.20 patches, got 6"):
        planner(token_drop=drop).plan(5, 12, 8)
    with pytest.raises(ValueError, match=r"Image 5 of 8 x 12 pixels: `resolution\.grid\(\)\[0\]` must be "):
        planner(resolution=Square(0)).plan(5, 12, 8)
    with pytest.raises(ValueError, match="Image 5 of 0 x 12 pixels: "):
        planner().plan(5, 12, 0)


@pytest.mark.parametrize("merge_size", [1, 2])
def test_grids_of_an_image_processor(merge_size: int) -> None:
    areas = {"shortest_edge": 400, "longest_edge": 1600}
    resolution = ProcessorResolution(NaViTImageProcessor(patch_size=4, merge_size=merge_size, size=areas))
    one = planner(100, merge_size=merge_size, resolution=resolution)
    for height, width in [(4, 8), (20, 30), (300, 100), (40, 40)]:
        plan = one.plan(0, height, width)
        expected = fit_to_grid(height, width, 4 * merge_size, 400, 1600)
        assert (4 * plan.rows, 4 * plan.columns) == expected
    with pytest.raises(ValueError, match="with 100 kept patches, which exceeds `capacity`=99"):
        planner(99, merge_size=merge_size, resolution=resolution)
    with pytest.raises(
        ValueError, match=f"`factor` must be .* of the image processor, {4 * merge_size} pixels, got 12"
    ):
        planner(merge_size=3, resolution=resolution).plan(0, 20, 20)


@pytest.mark.parametrize("name", ["patch_size", "capacity", "merge_size"])
@pytest.mark.parametrize("value", [0, -2, 1.5])
def test_limits_must_be_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
        ImagePlanner(**{"patch_size": 4, "capacity": 10, name: value})


def test_other_arguments_that_are_refused() -> None:
    with pytest.raises(ValueError, match="`oversize` must be 'raise' or 'shrink', got 'drop'"):
        planner(oversize="drop")
    with pytest.raises(ValueError, match=r"`capacity` must be at least merge_size\*\*2=4 patches, .* got 3"):
        planner(3, merge_size=2)
    with pytest.raises(ValueError, match="`seed`, `epoch` and `index` must be at least 0"):
        planner(seed=-1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "`sizes` must have the height and width of at least one image, got none"),
        (np.zeros((0, 2), dtype=int), "`sizes` must have the height and width of at least one image, got none"),
        ([(4, 4), (4, 0)], r"`sizes\[1\]` must have a height and a width of at least 1, got \(4, 0\)"),
        ([(-4, 4)], r"`sizes\[0\]` must have .* got \(-4, 4\)"),
        ([4, 4], r"`sizes` must be pairs of integers.* got an array of shape \(2,\)"),
        ([(4, 4, 3)], r"`sizes` must be pairs of integers.* got an array of shape \(1, 3\)"),
        ([(4.0, 4.0)], "`sizes` must be pairs of integers.* and type float64"),
        ([(True, True)], "`sizes` must be pairs of integers.* and type bool"),
        ([(4, 4), (4,)], "`sizes` must be pairs of integers.* got ragged rows"),
    ],
)
def test_sizes_must_be_pairs_of_positive_integers(sizes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_sizes(sizes)


def test_sizes_come_in_any_container() -> None:
    for sizes in ([(4, 5)], [[4, 5]], np.array([[4, 5]], dtype=np.uint16)):
        assert checked_sizes(sizes).tolist() == [[4, 5]]
    assert ImagePlan(*list(ImagePlan(1, 2, 3, 4, 5, 6, 7, 8))) == (1, 2, 3, 4, 5, 6, 7, 8)
