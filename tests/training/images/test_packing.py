"""Planned images: loaded, cut, the patches that stay, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.training.images.packed_pictures import (
    AREAS,
    CAPACITY,
    MAX_ITEMS,
    PICTURES,
    PROCESSOR,
    SIZES,
    Labelled,
    plan_of,
    whole,
)
from vlparts import NaViTImageProcessor
from vlparts.training.images.collator import PackedImageCollator
from vlparts.training.images.packing import ImageCutter, PackedImageDataset, kept_patches
from vlparts.training.images.stream import PackedImageStream


@pytest.mark.parametrize("merge_size", [1, 2])
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_patches_are_those_of_the_image_processor(index: int, merge_size: int) -> None:
    processor = NaViTImageProcessor(
        patch_size=4, merge_size=merge_size, size={"shortest_edge": 16, "longest_edge": 9999}
    )
    (image,) = PackedImageDataset(PICTURES, processor)[[plan_of(index, merge_size=merge_size)]]
    expected = processor(PICTURES[index], return_tensors="pt")
    assert torch.equal(image.patches, expected["pixel_values"])
    assert [1, image.rows, image.columns] == expected["image_grid_thw"][0].tolist()
    assert image.keep is None
    assert image.index == index


def test_another_grid_is_resized_to() -> None:
    """As the processor would, if its range of areas allowed this size alone."""
    plan = plan_of(3)._replace(rows=5, columns=5)
    (image,) = PackedImageDataset(PICTURES, PROCESSOR)[[plan]]
    forced = NaViTImageProcessor(patch_size=4, size={"shortest_edge": 16, "longest_edge": 400})
    assert torch.equal(image.patches, whole(3, forced))
    stretched = PackedImageDataset(PICTURES, PROCESSOR)[[plan._replace(rows=3, columns=9)]][0]
    resized = PICTURES[3].resize((36, 12), Image.Resampling.BICUBIC)
    expected = NaViTImageProcessor(patch_size=4, do_resize=False)(resized, return_tensors="pt")["pixel_values"]
    assert torch.equal(stretched.patches, expected)


def test_settings_of_the_processor_count() -> None:
    options = {"image_mean": [10, 20, 30], "image_std": [50, 60, 70], "do_rescale": False, "resample": 0}
    processor = NaViTImageProcessor(patch_size=4, **options)
    (image,) = PackedImageDataset(PICTURES, processor)[[plan_of(2)]]
    assert torch.equal(image.patches, whole(2, processor))
    assert not torch.equal(image.patches, whole(2))


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.bool_])
def test_arrays_are_read_as_by_the_image_processor(dtype: type) -> None:
    levels = np.random.default_rng(0).integers(0, 2, (20, 12, 3)) * (65535 if dtype is np.uint16 else 1)
    processor = NaViTImageProcessor(patch_size=4, size=AREAS)
    (image,) = PackedImageDataset([levels.astype(dtype)], processor)[[plan_of(0)]]
    assert torch.equal(image.patches, processor(levels.astype(dtype), return_tensors="pt")["pixel_values"])
    assert torch.equal(image.patches, torch.where(image.patches > 0, 1.0, -1.0))  # black and white


def test_an_ambiguous_array_needs_the_data_format_of_the_processor() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 12, 3), dtype=np.uint8)
    plan = plan_of(0)._replace(height=4, width=12, rows=1, columns=3)
    with pytest.raises(ValueError, match=r"Image 0: .* \(4, 12, 3\) has two axes that can be the channels"):
        PackedImageDataset([image], PROCESSOR)[[plan]]
    processor = NaViTImageProcessor(patch_size=4, input_data_format="channels_last")
    (cut,) = PackedImageDataset([image], processor)[[plan]]
    assert torch.equal(cut.patches, PackedImageDataset([Image.fromarray(image)], PROCESSOR)[[plan]][0].patches)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("merge_size", [1, 2])
def test_dropped_patches_leave_the_others_as_they_are(rate: float, merge_size: int) -> None:
    processor = NaViTImageProcessor(patch_size=4, merge_size=merge_size)
    plan = plan_of(3, rate, merge_size)
    (image,) = PackedImageDataset(PICTURES, processor)[[plan]]
    assert image.keep is not None
    assert torch.equal(image.keep, kept_patches(plan, merge_size))
    assert torch.equal(image.patches, whole(3, processor)[image.keep])
    assert len(image.patches) == plan.kept < 100
    blocks = image.keep.view(-1, merge_size**2)  # whole blocks, in their order
    assert (blocks.diff(dim=1) == 1).all()
    assert (blocks[:, 0] % merge_size**2 == 0).all()
    assert (image.keep.diff() > 0).all()
    assert (image.rows, image.columns) == (plan.rows, plan.columns)


def test_the_kept_patches_depend_on_the_plan_only() -> None:
    dataset = PackedImageDataset(PICTURES, PROCESSOR)
    plan = plan_of(3, 0.5)
    first, second = dataset[[plan, plan]]
    assert torch.equal(first.keep, second.keep)
    other = dataset[[plan_of(3, 0.5, epoch=1)]][0]
    assert not torch.equal(first.keep, other.keep)


def test_every_patch_is_kept_equally_often() -> None:
    plan = plan_of(0, 0.5)
    counts = torch.zeros(plan.rows * plan.columns)
    for seed in range(2000):
        counts[kept_patches(plan._replace(seed=seed))] += 1
    expected = 2000 * plan.kept / len(counts)
    assert (counts - expected).abs().max() < 5 * (expected * (1 - plan.kept / len(counts))) ** 0.5


@pytest.mark.parametrize(
    ("wrap", "image_key", "label_key", "label"),
    [
        (lambda image: image, None, None, None),
        (lambda image: {"image": image, "label": 2}, "image", "label", 2),
        (lambda image: {"image": image, "label": 2}, "image", None, None),
        (lambda image: (image, np.int64(5)), 0, 1, 5),
        (lambda image: (torch.tensor(7), image), 1, 0, 7),
        (lambda image: np.asarray(image), None, None, None),
        (lambda image: {"x": torch.from_numpy(np.array(image).transpose(2, 0, 1))}, "x", None, None),
    ],
)
def test_items_of_many_kinds(wrap: Any, image_key: Any, label_key: Any, label: int | None) -> None:
    dataset = PackedImageDataset([wrap(image) for image in PICTURES], PROCESSOR, image_key, label_key)
    (image,) = dataset[[plan_of(2)]]
    assert torch.equal(image.patches, whole(2))
    if label is None:
        assert image.label is None
    else:
        assert torch.equal(image.label, torch.tensor(label))


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (3, torch.tensor(3)),
        (np.uint8(3), torch.tensor(3)),
        (0.5, torch.tensor(0.5)),
        ([0.0, 1.0], torch.tensor([0.0, 1.0])),
        (np.array([0.0, 1.0]), torch.tensor([0.0, 1.0])),
    ],
)
def test_labels_of_many_kinds(label: Any, expected: Tensor) -> None:
    dataset = PackedImageDataset([(PICTURES[0], label), (PICTURES[1], label)], PROCESSOR, 0, 1)
    images = dataset[[plan_of(0), plan_of(1)]]
    assert all(torch.equal(image.label, expected) and image.label.dtype == expected.dtype for image in images)
    labels = PackedImageCollator(CAPACITY, MAX_ITEMS)(images)["labels"]
    padding = torch.full_like(expected, -100)
    assert torch.equal(labels, torch.stack([expected, expected, padding, padding]))
    blank = PackedImageCollator(CAPACITY, MAX_ITEMS)(dataset[[]])["labels"]
    assert torch.equal(blank, torch.stack([padding] * 4))
    assert blank.dtype == labels.dtype
    (fewer,) = PackedImageDataset([(PICTURES[0], [1.0])], PROCESSOR, 0, 1)[[plan_of(0)]]
    with pytest.raises(ValueError, match=r"Labels of a batch must have one type and shape, got torch\."):
        PackedImageCollator(CAPACITY, MAX_ITEMS)([*images, fewer])


def test_grey_arrays_have_one_channel() -> None:
    processor = NaViTImageProcessor(patch_size=4, image_mean=0.5, image_std=0.5, do_convert_rgb=False)
    grey = np.asarray(PICTURES[0].convert("L"))
    (image,) = PackedImageDataset([grey], processor, num_channels=1)[[plan_of(0)]]
    assert image.patches.shape == (15, 16)
    with pytest.raises(ValueError, match="Image 0 has 1 channels; expected `num_channels`=3"):
        PackedImageDataset([grey], processor)[[plan_of(0)]]


def test_a_pack_without_images_has_a_width() -> None:
    (blank,) = PackedImageDataset(PICTURES, PROCESSOR)[[]]
    assert blank.patches.shape == (0, 48)
    assert (blank.rows, blank.columns, blank.label) == (0, 0, None)
    (blank,) = PackedImageDataset(Labelled(), PROCESSOR, "image", "label")[[]]
    assert torch.equal(blank.label, torch.tensor(-100))


def test_an_image_of_another_size_is_refused() -> None:
    turned = plan_of(0)._replace(height=12, width=20)
    message = r"Image 0 has a height of 20 and a width of 12 pixels; `sizes` of the sampler has 12 and 20\. Sizes are"
    with pytest.raises(ValueError, match=message):
        PackedImageDataset(PICTURES, PROCESSOR)[[turned]]
    (image,) = PackedImageDataset(PICTURES, PROCESSOR, on_size_mismatch="resize")[[turned]]
    assert torch.equal(image.patches, whole(0))


@pytest.mark.parametrize(
    ("item", "keys", "message"),
    [
        ({"img": PICTURES[0]}, ("image",), r"`image_key` 'image' is not in item 0, which has the keys \['img'\]"),
        ((PICTURES[0],), (0, 1), r"`label_key` 1 is not in item 0, which has type tuple"),
        (PICTURES[0], ("image",), r"`image_key` 'image' is not in item 0, which has type Image"),
        (
            (PICTURES[0], "cat"),
            (0, 1),
            "The label of item 0 must be an integer, a float or a vector .* got 'cat'",
        ),
        ((PICTURES[0], None), (0, 1), "The label of item 0 must be an integer, .* got None"),
        ((PICTURES[0], [1, 2]), (0, 1), r"The label of item 0 must be an integer, .* got \[1, 2\]"),
        ((PICTURES[0], True), (0, 1), "The label of item 0 must be an integer, .* got True"),
        ((PICTURES[0], []), (0, 1), r"The label of item 0 must be an integer, .* got \[\]"),
        ({"image": PICTURES[0]}, (), "Image 0: .*dict"),
        (np.full((8, 8, 3), np.nan), (), "Image 0: The image holds values that are not finite"),
        (np.zeros((0, 8, 3)), (), "Image 0: .*expected at least 1 x 1"),
    ],
)
def test_items_that_are_refused(item: Any, keys: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedImageDataset([item], PROCESSOR, *keys)[[plan_of(0)]]


def test_arguments_that_are_refused() -> None:
    with pytest.raises(ValueError, match="`on_size_mismatch` must be 'raise' or 'resize', got 'crop'"):
        PackedImageDataset([], PROCESSOR, on_size_mismatch="crop")
    for dataset, name in ((PackedImageStream([], PROCESSOR, 10), "PackedImageStream"), (iter([]), "list_iterator")):
        with pytest.raises(ValueError, match=f"`dataset` must be a map-style dataset, got {name}; PackedImageStream"):
            PackedImageDataset(dataset, PROCESSOR)
    with pytest.raises(ValueError, match="`num_channels` must be an integer of at least 1, got 0"):
        ImageCutter(PROCESSOR, num_channels=0)
