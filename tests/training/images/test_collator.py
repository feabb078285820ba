"""Packs joined to one sequence: against loops, through a DataLoader, and by a model."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from tests.tiny import navit_config, order_one
from tests.training.images.packed_pictures import (
    CAPACITY,
    MAX_ITEMS,
    PICTURES,
    PROCESSOR,
    SIZES,
    Labelled,
    images_of,
    plan_of,
    whole,
)
from vlparts import NaViTForImageClassification, NaViTImageProcessor
from vlparts.parts.packed_index import get_position_ids
from vlparts.training.images.collator import PackedImageCollator
from vlparts.training.images.packing import PackedImageDataset, PatchedImage
from vlparts.training.images.resolution import ResolutionSampler
from vlparts.training.images.sampler import PackedImageSampler
from vlparts.training.images.token_drop import BetaDrop


def check(inputs: dict[str, Any], images: list[PatchedImage], capacity: int, max_items: int) -> None:
    """Compare inputs with loops over images and patches."""
    full = [torch.arange(image.rows * image.columns) if image.keep is None else image.keep for image in images]
    rows = sum(len(keep) for keep in full)
    starts = np.cumsum([0] + [image.rows * image.columns for image in images])
    positions = [
        (place // image.columns, place % image.columns)
        for image, keep in zip(images, full, strict=True)
        for place in keep.tolist()
    ]
    segments = [0]
    for keep in full:
        segments.append(segments[-1] + len(keep))
    keep_index = [start + place for start, keep in zip(starts, full, strict=False) for place in keep.tolist()]
    blanks, padding = max_items - len(images), capacity - rows

    assert inputs["pixel_values"].shape == (capacity, 48)
    for image, start, end in zip(images, segments, segments[1:], strict=False):
        assert torch.equal(inputs["pixel_values"][start:end], image.patches)
    assert not inputs["pixel_values"][rows:].any()
    grids = [[1, image.rows, image.columns] for image in images] + [[0, 0, 0]] * blanks
    assert inputs["image_grid_thw"].tolist() == grids
    assert inputs["position_ids"].tolist() == [list(p) for p in positions] + [[0, 0]] * padding
    if "keep_index" in inputs:
        assert inputs["keep_index"].tolist() == keep_index + [-1] * padding
        assert inputs["keep_index"].dtype == torch.int64
    else:
        assert keep_index == list(range(rows))
        assert not padding
    last = [] if len(inputs["cu_seqlens"]) == max_items + 1 else [capacity]
    assert inputs["cu_seqlens"].tolist() == segments + [rows] * blanks + last
    assert inputs["cu_seqlens"].dtype == torch.int32
    assert inputs["image_mask"].tolist() == [True] * len(images) + [False] * blanks
    assert inputs["labels"].tolist() == [image.index % 3 for image in images] + [-100] * blanks
    for name in ("image_grid_thw", "position_ids", "labels"):
        assert inputs[name].dtype == torch.int64
    assert inputs["pixel_values"].dtype == torch.float32
    assert type(inputs["max_seqlen"]) is int


@pytest.mark.parametrize("rates", [(0, 0, 0), (0.5, 0, 0.3), (0.9, 0.9, 0.9)])
def test_a_padded_pack(rates: tuple[float, ...]) -> None:
    images = images_of(rates)
    inputs = PackedImageCollator(CAPACITY, MAX_ITEMS)(images)
    check(inputs, images, CAPACITY, MAX_ITEMS)
    assert len(inputs["cu_seqlens"]) == MAX_ITEMS + 2
    assert inputs["max_seqlen"] == CAPACITY
    assert "keep_index" in inputs


@pytest.mark.parametrize("rates", [(0, 0, 0), (0.5, 0, 0.3)])
def test_a_pack_without_padding(rates: tuple[float, ...]) -> None:
    images = images_of(rates)
    rows = sum(len(image.patches) for image in images)
    inputs = PackedImageCollator(pad=False)(images)
    check(inputs, images, rows, 3)
    assert len(inputs["cu_seqlens"]) == 4
    assert inputs["max_seqlen"] == max(len(image.patches) for image in images)
    assert ("keep_index" in inputs) == any(rates)


@pytest.mark.parametrize("pad", [True, False])
def test_bounds_are_the_numbers_of_the_boundaries(pad: bool) -> None:
    limits = (CAPACITY, MAX_ITEMS) if pad else (None, None)
    assert "cu_seqlens_cpu" not in PackedImageCollator(*limits, pad=pad)(images_of((0, 0.5)))
    inputs = PackedImageCollator(*limits, pad=pad, return_cu_seqlens_cpu=True)(images_of((0, 0.5)))
    assert inputs["cu_seqlens_cpu"] == inputs["cu_seqlens"].tolist()


def test_a_full_pack_has_an_empty_last_segment() -> None:
    images = images_of((0, 0))
    rows = sum(len(image.patches) for image in images)
    inputs = PackedImageCollator(rows, 2)(images)
    check(inputs, images, rows, 2)
    assert inputs["cu_seqlens"][-2:].tolist() == [rows, rows]


@pytest.mark.parametrize("pad", [True, False])
def test_several_packs_become_one_sequence(pad: bool) -> None:
    packs = [images_of((0.5, 0)), images_of((0, 0, 0.7), (4, 5, 6))]
    images = packs[0] + packs[1]
    rows = sum(len(image.patches) for image in images)
    inputs = PackedImageCollator(CAPACITY, MAX_ITEMS, pad=pad)(packs)
    check(inputs, images, 2 * CAPACITY if pad else rows, 2 * MAX_ITEMS if pad else 5)


def test_an_empty_pack_is_all_padding() -> None:
    dataset = PackedImageDataset(Labelled(), PROCESSOR, "image", "label")
    collator = PackedImageCollator(CAPACITY, MAX_ITEMS, return_indices=True)
    inputs, other = collator(dataset[[]]), collator(images_of((0, 0.5)))
    check(inputs, [], CAPACITY, MAX_ITEMS)
    assert {name: getattr(value, "shape", value) for name, value in inputs.items()} == {
        name: getattr(value, "shape", value) for name, value in other.items()
    }
    together = collator([images_of((0,)), dataset[[]]])
    check(together, images_of((0,)), 2 * CAPACITY, 2 * MAX_ITEMS)
    with pytest.raises(ValueError, match="`batch` must contain at least one image without padding, got none"):
        PackedImageCollator(pad=False)(dataset[[]])
    with pytest.raises(ValueError, match="`batch` must contain at least one image"):
        collator([])


def test_positions_follow_the_order_of_merge_blocks() -> None:
    processor = NaViTImageProcessor(patch_size=4, merge_size=2)
    dataset = PackedImageDataset(PICTURES, processor)
    images = dataset[[plan_of(index, rate, merge_size=2) for index, rate in ((3, 0.5), (4, 0.0))]]
    inputs = PackedImageCollator(120, 3, merge_size=2)(images)
    every = get_position_ids(inputs["image_grid_thw"][:2], 2)
    kept = inputs["keep_index"][inputs["keep_index"] >= 0]
    assert torch.equal(inputs["position_ids"][: len(kept)], every[kept])


def test_indices_are_given_on_request() -> None:
    images = images_of((0, 0))
    assert "indices" not in PackedImageCollator(CAPACITY, MAX_ITEMS)(images)
    inputs = PackedImageCollator(CAPACITY, MAX_ITEMS, return_indices=True)(images)
    assert inputs["indices"].tolist() == [0, 1, -1, -1]


def test_without_labels_there_are_none() -> None:
    images = PackedImageDataset(PICTURES, PROCESSOR)[[plan_of(0), plan_of(1)]]
    assert "labels" not in PackedImageCollator(CAPACITY, MAX_ITEMS)(images)
    with pytest.raises(ValueError, match="Image 0 has no label, but other images of its batch have one"):
        PackedImageCollator(CAPACITY, MAX_ITEMS)([*images, *images_of((0,), (4,))])


def test_a_pack_beyond_the_limits_is_refused() -> None:
    images = images_of((0, 0, 0))
    with pytest.raises(ValueError, match=r"A pack has 35 patches, which exceeds `capacity`=34 of the collator\. Pass"):
        PackedImageCollator(34, MAX_ITEMS)(images)
    with pytest.raises(ValueError, match="A pack has 3 images, which exceeds `max_items`=2 of the collator"):
        PackedImageCollator(CAPACITY, 2)(images)
    with pytest.raises(ValueError, match="exceeds `max_items`=2"):
        PackedImageCollator(None, 2, pad=False)([images[:1], images])


@pytest.mark.parametrize("name", ["capacity", "max_items", "merge_size"])
def test_limits_of_the_collator_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1, got 0"):
        PackedImageCollator(**{"capacity": 5, "max_items": 5, name: 0})


@pytest.mark.parametrize("limits", [(), (5,), (None, 5)])
def test_padding_needs_limits(limits: tuple[int | None, ...]) -> None:
    missing = "max_items" if limits == (5,) else "capacity"
    with pytest.raises(ValueError, match=f"`{missing}` is required for padding; pass pad=False"):
        PackedImageCollator(*limits)


# --- through a loader, and by a model


def loader(
    workers: int = 0, pad: bool = True, batch_sampler: bool = True, packs: int = 1, **options: Any
) -> DataLoader:
    sampler = PackedImageSampler(SIZES, 4, CAPACITY, MAX_ITEMS, carry_over=False, **options)
    place: dict[str, Any] = {"batch_sampler": sampler} if batch_sampler else {"sampler": sampler, "batch_size": packs}
    return DataLoader(
        PackedImageDataset(Labelled(), PROCESSOR, "image", "label"),
        num_workers=workers,
        collate_fn=PackedImageCollator(CAPACITY, MAX_ITEMS, pad=pad, return_indices=True),
        **place,
    )


def test_batches_are_the_same_with_any_loader() -> None:
    options = {"resolution": ResolutionSampler(8, 32), "token_drop": BetaDrop(0.4, 0.8)}
    expected = list(loader(**options))
    assert sorted(torch.cat([batch["indices"] for batch in expected]).tolist())[-8:] == list(range(8))
    for other in (
        loader(2, **options),
        loader(batch_sampler=False, **options),
        loader(2, batch_sampler=False, packs=1, **options),
    ):
        batches = list(other)
        assert len(batches) == len(expected)
        for batch, one in zip(batches, expected, strict=True):
            assert batch.keys() == one.keys()
            assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(one[name])) for name in one)


def test_loaders_of_packs_without_a_batch_size() -> None:
    sampler = PackedImageSampler(SIZES, 4, CAPACITY, MAX_ITEMS, carry_over=False)
    dataset = PackedImageDataset(PICTURES, PROCESSOR)
    batches = list(DataLoader(dataset, None, sampler=sampler, collate_fn=PackedImageCollator(CAPACITY, MAX_ITEMS)))
    assert len(batches) > 1
    assert {len(batch["pixel_values"]) for batch in batches} == {CAPACITY}
    assert sum(int(batch["image_mask"].sum()) for batch in batches) == len(SIZES)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("token_drop", [None, BetaDrop(0.4, 0.8)])
def test_packed_images_are_encoded_as_alone(pad: bool, token_drop: Any) -> None:
    """Whatever its neighbours, the padding and what was precomputed, an image comes out as from its patches alone."""
    model = order_one(NaViTForImageClassification(navit_config(num_labels=3))).eval()
    found = 0
    for batch in loader(pad=pad, token_drop=token_drop):
        indices, kept = batch.pop("indices"), batch["cu_seqlens"].diff()
        with torch.no_grad():
            outputs = model(**batch)
        alone = []
        for place, index in enumerate(indices[batch["image_mask"]].tolist()):
            rows = slice(*batch["cu_seqlens"][place : place + 2].tolist())
            keep = batch["position_ids"][rows] @ torch.tensor([batch["image_grid_thw"][place, 2], 1])
            assert len(keep) == kept[place]
            with torch.no_grad():
                one = model(whole(index)[keep], batch["image_grid_thw"][place : place + 1], keep_index=keep)
            alone.append(one.logits[0])
        found += len(alone)
        logits = torch.stack(alone)
        torch.testing.assert_close(outputs.logits[: len(alone)], logits, atol=1e-5, rtol=1e-5)
        expected = functional.cross_entropy(logits, batch["labels"][batch["image_mask"]])
        torch.testing.assert_close(outputs.loss, expected, atol=1e-5, rtol=1e-5)
    assert found == len(SIZES)


def test_a_model_is_compiled_once_for_all_batches() -> None:
    config = navit_config(num_labels=3, problem_type="single_label_classification")
    model = order_one(NaViTForImageClassification(config)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batches = list(loader(token_drop=BetaDrop(0.4, 0.8)))
    assert len({tuple(batch["cu_seqlens"].tolist()) for batch in batches}) == len(batches) > 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches:
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
