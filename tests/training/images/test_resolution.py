"""Resolution sampling: the eight distributions of the paper, the sizes that they give, and a dataset with them."""

import copy
import itertools
import math
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torch.utils.data import DataLoader

from vlparts.parts.image_processing_navit import NaViTImageProcessor
from vlparts.training.images.resolution import ResolutionDataset, ResolutionSampler, seeded_generator

DISTRIBUTIONS = [("uniform", 0.0), ("truncated_normal", 0.0), ("truncated_normal", -0.5), ("truncated_normal", 0.5)]
SIDES = st.integers(1, 3000)
SEEDS = st.integers(0, 2**32)
SAMPLER = ResolutionSampler(24, 96, distribution="truncated_normal", mean=-0.5)


@st.composite
def samplers(draw: st.DrawFn) -> ResolutionSampler:
    low, high = sorted(draw(st.tuples(st.floats(1, 300), st.floats(1, 300))))
    distribution, mean = draw(st.sampled_from(DISTRIBUTIONS))
    return ResolutionSampler(low, high, draw(st.sampled_from(["side", "area"])), distribution, mean)


def photos(count: int = 6) -> list[Image.Image]:
    """Pictures of noise in several sizes."""
    generator = np.random.default_rng(0)
    sizes = [(40 + 9 * index, 100 - 7 * index) for index in range(count)]
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def loaded(loader: DataLoader) -> list[np.ndarray]:
    """What a loader of batches of images gives."""
    return [np.asarray(image) for batch in loader for image in batch]


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return len(first) == len(second) and all(map(np.array_equal, first, second))


@pytest.mark.parametrize(("distribution", "mean"), DISTRIBUTIONS)
@pytest.mark.parametrize("quantity", ["side", "area"])
def test_resolutions_have_their_distribution_function(quantity: str, distribution: str, mean: float) -> None:
    sampler = ResolutionSampler(64, 384, quantity, distribution, mean)
    generator = np.random.default_rng(0)
    drawn = np.array([sampler.sample(generator) for _ in range(4000)])
    assert 64 <= drawn.min() < 80
    assert 370 < drawn.max() <= 384
    exact = stats.uniform(-1, 2) if distribution == "uniform" else stats.truncnorm(-1 - mean, 1 - mean, loc=mean)
    power = 1 if quantity == "side" else 2
    u = 2 * (drawn**power - 64**power) / (384**power - 64**power) - 1
    assert stats.kstest(u, exact.cdf).pvalue > 1e-4


def test_small_images_are_the_most_frequent_with_the_paper_s_best() -> None:
    shares = {}
    for quantity, (distribution, mean) in itertools.product(("side", "area"), DISTRIBUTIONS):
        sampler, generator = ResolutionSampler(64, 384, quantity, distribution, mean), np.random.default_rng(0)
        drawn = np.array([sampler.sample(generator) for _ in range(1000)])
        shares[quantity, distribution, mean] = (drawn < 224).mean()
    assert max(shares, key=lambda case: shares[case]) == ("side", "truncated_normal", -0.5)
    assert all(shares["area", *case] < shares["side", *case] for case in DISTRIBUTIONS)


@given(samplers(), SIDES, SIDES, st.integers(1, 40), SEEDS)
def test_grids_keep_to_the_area_and_to_the_aspect_ratio(
    sampler: ResolutionSampler, height: int, width: int, factor: int, seed: int
) -> None:
    resolution = sampler.sample(np.random.default_rng(seed))
    rows, columns = sampler.grid(height, width, factor, np.random.default_rng(seed))
    assert sampler.low <= resolution <= sampler.high
    limit = max(1, math.floor(resolution**2) // factor**2)
    assert 1 <= rows * columns <= limit <= sampler.max_length(factor)
    exact = [side * resolution / math.sqrt(height * width) / factor for side in (height, width)]
    if min(exact) >= 1:
        for found, wanted in zip((rows, columns), exact, strict=True):
            assert abs(found - wanted) < 1 + wanted / min(exact) / 1000
    again = np.random.default_rng(seed)
    assert sampler.target_size(height, width, factor, again) == (rows * factor, columns * factor)


@pytest.mark.parametrize(("height", "width"), [(1, 5000), (5000, 1), (1, 40), (7, 3000), (1, 1)])
def test_extreme_aspect_ratios_stay_within_the_capacity(height: int, width: int) -> None:
    sampler = ResolutionSampler(20, 130)
    for seed in range(50):
        rows, columns = sampler.grid(height, width, 16, np.random.default_rng(seed))
        resolution = sampler.sample(np.random.default_rng(seed))
        assert rows * columns <= max(1, int(resolution**2) // 256)
        assert (rows <= columns) if height < width else (columns <= rows)


def test_sizes_that_fit_are_exact() -> None:
    generator = np.random.default_rng(0)
    assert ResolutionSampler(96, 96).grid(500, 500, 16, generator) == (6, 6)
    assert ResolutionSampler(96, 96, "area").grid(900, 400, 16, generator) == (9, 4)
    assert ResolutionSampler(96, 96).grid(11, 396, 16, generator) == (1, 36)
    assert ResolutionSampler(96, 96).max_length(16) == 36
    assert ResolutionSampler(8, 10).max_length(16) == 1
    assert ResolutionSampler(8, 10).grid(300, 200, 16, generator) == (1, 1)


def test_the_largest_length_is_reached() -> None:
    sampler = ResolutionSampler(64, 256)
    lengths = [math.prod(sampler.grid(480, 480, 16, np.random.default_rng(seed))) for seed in range(400)]
    assert sampler.max_length(16) == 256
    assert 225 <= max(lengths) <= 256
    assert min(lengths) == 16


def test_the_image_processor_leaves_sampled_sizes_alone() -> None:
    processor = NaViTImageProcessor(patch_size=16, merge_size=2, size={"shortest_edge": 1, "longest_edge": 256**2})
    sampler = ResolutionSampler(64, 256)
    for seed in range(50):
        rows, columns = sampler.grid(300, 500 + seed, 32, np.random.default_rng(seed))
        assert processor.get_grid_thw(rows * 32, columns * 32) == (1, rows * 2, columns * 2)


def test_seeded_generators_differ_in_each_of_the_three() -> None:
    numbers = {seeded_generator(*key).random() for key in itertools.product(range(4), repeat=3)}
    assert len(numbers) == 64
    assert seeded_generator(1, 2, 3).random() == seeded_generator(1, 2, 3).random()


def test_a_dataset_gives_each_image_the_size_drawn_for_it() -> None:
    images = photos()
    dataset = ResolutionDataset(images, SAMPLER, patch_size=4, seed=5, merge_size=2)
    assert len(dataset) == len(images)
    for epoch, (index, image) in itertools.product((0, 7), enumerate(images)):
        dataset.set_epoch(epoch)
        assert dataset.epoch == epoch
        rows, columns = SAMPLER.grid(image.height, image.width, 8, seeded_generator(5, epoch, index))
        found = dataset[index]
        assert found.mode == "RGB"
        assert found.size == (columns * 8, rows * 8)
        expected = image.resize(found.size, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        np.testing.assert_array_equal(np.asarray(dataset[index - len(images)]), np.asarray(found))
    with pytest.raises(IndexError):
        dataset[len(images)]


def test_items_keep_everything_but_the_image() -> None:
    image = photos(1)[0]
    plain = ResolutionDataset([image], SAMPLER, 8)[0]
    item = {"picture": image, "label": 3}
    found = ResolutionDataset([item], SAMPLER, 8, image_key="picture")[0]
    assert item == {"picture": image, "label": 3}
    assert list(found) == ["picture", "label"]
    assert found["label"] == 3
    assert found["picture"] == plain
    for pair, position in (((image, 3), 0), ((3, image), 1), ([3, image], -1)):
        expected = (plain, 3) if position == 0 else (3, plain)
        assert ResolutionDataset([pair], SAMPLER, 8, image_key=position)[0] == expected


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_images_of_any_mode_become_rgb_before_they_are_resized(mode: str) -> None:
    """Pillow would resize palettes and bits without a filter."""
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = Image.fromarray(levels) if mode == "I;16" else photos(1)[0].convert(mode)
    found = ResolutionDataset([image], ResolutionSampler(30, 30), 5)[0]
    assert found.mode == "RGB"
    assert len(np.unique(np.asarray(found))) > 20


@pytest.mark.parametrize("channels", [(), (3,), (4,)])
def test_arrays_come_back_as_arrays(channels: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 80, *channels), dtype=np.uint8)
    dataset, pictures = (ResolutionDataset([one], SAMPLER, 8) for one in (array, Image.fromarray(array)))
    assert dataset[0].dtype == np.uint8
    assert dataset[0].shape[2] == 3
    np.testing.assert_array_equal(dataset[0], np.asarray(pictures[0]))


@pytest.mark.parametrize("persistent", [False, True])
def test_any_number_of_workers_gives_the_same_images_in_every_epoch(persistent: bool) -> None:
    images = photos()
    here = ResolutionDataset(images, SAMPLER, 8, seed=1)
    shared = ResolutionDataset(images, SAMPLER, 8, seed=1)
    alone = DataLoader(here, batch_size=2, collate_fn=list)
    several = DataLoader(shared, 2, num_workers=2, collate_fn=list, persistent_workers=persistent)
    epochs = []
    for epoch in (0, 1, 5):
        here.set_epoch(epoch)
        shared.set_epoch(epoch)
        epochs.append(loaded(alone))
        assert same(epochs[-1], loaded(several))
    assert not any(same(first, second) for first, second in itertools.combinations(epochs, 2))


def test_what_travels_to_a_started_worker_shares_the_epoch() -> None:
    """Start methods other than `fork` send the dataset as bytes, with handles of its shared memory."""
    dataset = ResolutionDataset(photos(1), SAMPLER, 8)
    arrived = ForkingPickler.loads(ForkingPickler.dumps(dataset))
    for epoch in (2, 3):
        dataset.set_epoch(epoch)
        assert arrived.epoch == epoch
        assert same([np.asarray(arrived[0])], [np.asarray(dataset[0])])


@pytest.mark.slow
def test_started_workers_see_the_epoch_as_forked_ones_do() -> None:
    images = photos(2)
    dataset = ResolutionDataset(images, SAMPLER, 8)
    loader = DataLoader(
        dataset, num_workers=1, collate_fn=list, persistent_workers=True, multiprocessing_context="spawn"
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        here = [np.asarray(dataset[index]) for index in range(2)]
        assert same(here, loaded(loader))


def test_a_copy_has_an_epoch_of_its_own() -> None:
    dataset = ResolutionDataset(photos(1), SAMPLER, 8)
    dataset.set_epoch(3)
    twin = copy.deepcopy(dataset)
    twin.set_epoch(4)
    assert (dataset.epoch, twin.epoch) == (3, 4)
    loader = DataLoader(twin, num_workers=1, collate_fn=list, persistent_workers=True)
    for epoch in (6, 7):
        twin.set_epoch(epoch)
        assert same([np.asarray(twin[0])], loaded(loader))


INVALID: list[tuple[Callable[[], Any], str]] = [
    (lambda: ResolutionSampler(0, 64), "`low` and `high` must be pixels with 0 < low <= high .* got 0 and 64"),
    (lambda: ResolutionSampler(65, 64), "`low` and `high` must be pixels"),
    (lambda: ResolutionSampler(64, math.inf), "`low` and `high` must be pixels"),
    (lambda: ResolutionSampler(math.nan, 64), "`low` and `high` must be pixels"),
    (lambda: ResolutionSampler(64, 65, "sides"), "`quantity` must be 'side' or 'area', got 'sides'"),
    (lambda: ResolutionSampler(64, 65, distribution="normal"), "`distribution` must be .* got 'normal'"),
    (lambda: ResolutionSampler(64, 65, "side", "truncated_normal", 1.5), r"`mean` must lie in \[-1, 1\], got 1.5"),
    (lambda: ResolutionSampler(64, 65, mean=0.5), "`mean` must be 0 with distribution='uniform', got 0.5"),
    (lambda: SAMPLER.grid(0, 5, 8, np.random.default_rng(0)), r"size of 5 x 0 pixels \(width x height\)"),
    (lambda: SAMPLER.grid(5, 5, 0, np.random.default_rng(0)), "`factor` must be an integer of at least 1, got 0"),
    (lambda: SAMPLER.max_length(0), "`factor` must be an integer of at least 1, got 0"),
    (lambda: seeded_generator(0, -1, 0), "`seed`, `epoch` and `index` must be at least 0, got 0, -1 and 0"),
    (lambda: ResolutionDataset([], SAMPLER, 0), "`patch_size` must be an integer of at least 1, got 0"),
    (
        lambda: ResolutionDataset(["a.png"], SAMPLER, 8)[0],
        "An image must be a Pillow image, a NumPy array or a tensor, got str",
    ),
    (lambda: ResolutionDataset([np.full((9, 9, 3), 2.0)], SAMPLER, 8)[0], r"values of 2\.\.2 in float64"),
    (lambda: ResolutionDataset([np.zeros((3, 9, 4), np.uint8)], SAMPLER, 8)[0], r"\(3, 9, 4\) has two axes"),
    (lambda: ResolutionDataset([np.zeros((0, 4, 3), np.uint8)], SAMPLER, 8)[0], "expected at least 1 x 1"),
    (lambda: ResolutionDataset([], SAMPLER, 4, merge_size=0), "`merge_size` must be an integer of at least 1, got 0"),
    (lambda: ResolutionDataset(photos(1), SAMPLER, 8).set_epoch(-1), "`epoch` must be at least 0, got -1"),
]


@pytest.mark.parametrize(("call", "message"), INVALID)
def test_invalid_arguments_raise(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
