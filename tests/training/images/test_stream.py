"""Packs from a stream: what is packed, by which worker, and from which state."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from tests.tiny import picture
from vlparts import NaViTImageProcessor
from vlparts.training.images.collator import PackedImageCollator
from vlparts.training.images.packing import PackedImageDataset, PatchedImage
from vlparts.training.images.plan import ImagePlanner
from vlparts.training.images.resolution import ResolutionSampler
from vlparts.training.images.stream import PackedImageStream
from vlparts.training.images.token_drop import BetaDrop, ScheduledDrop

PROCESSOR = NaViTImageProcessor(patch_size=4)
ITEMS = [{"image": picture(8 + 4 * (index % 7), 24 - 4 * (index % 3)), "label": index} for index in range(40)]
DRAWS = {"resolution": ResolutionSampler(8, 40), "token_drop": BetaDrop(0.3, 0.6)}


def stream(items: Any = ITEMS, capacity: int = 110, max_items: int | None = 5, **options: Any) -> PackedImageStream:
    options = {"image_key": "image", "label_key": "label", "open_bins": 3, **DRAWS, **options}
    return PackedImageStream(items, PROCESSOR, capacity, max_items, **options)


def contents(pack: list[PatchedImage]) -> list[tuple[Any, ...]]:
    """A pack in values that can be compared."""
    return [tuple(v.tolist() if isinstance(v, Tensor) else v for v in vars(image).values()) for image in pack]


def everything(one: PackedImageStream) -> list[list[tuple[Any, ...]]]:
    return [contents(pack) for pack in one]


class Source:
    """Items with a state of their own, as those of the datasets library have."""

    def __init__(self) -> None:
        self.place = 0
        self.read: list[int] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(self.place, len(ITEMS)):
            self.place = index + 1
            self.read.append(index)
            yield ITEMS[index]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Shared:
    """Items that divide themselves among workers."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        yield from ITEMS[info.id :: info.num_workers] if info else ITEMS


def test_packs_hold_every_image_once_within_the_limits() -> None:
    packs = list(stream())
    assert sorted(int(image.label) for pack in packs for image in pack) == list(range(40))
    assert all(sum(len(image.patches) for image in pack) <= 110 and len(pack) <= 5 for pack in packs)


def test_images_are_planned_and_cut_as_by_index() -> None:
    """The planner and the dataset give the same patches for the same seed, epoch and place."""
    one = stream(seed=3)
    one.set_epoch(2)
    planner = ImagePlanner(4, 110, seed=3, **DRAWS)
    dataset = PackedImageDataset(ITEMS, PROCESSOR, "image", "label")
    for pack in one:
        plans = [planner.plan(image.index, *ITEMS[image.index]["image"].size[::-1], 2) for image in pack]
        assert contents(pack) == contents(dataset[plans])


def test_epochs_differ_and_repeat() -> None:
    one = stream()
    first = everything(one)
    assert everything(one) == first
    one.set_epoch(1)
    assert everything(one) != first
    one.set_epoch(0)
    assert everything(one) == first


def test_schedules_see_the_images_of_all_processes() -> None:
    drop = ScheduledDrop(0.0, 0.9, midpoint=100, timescale=10)
    items = [picture(40, 40)] * 20
    options = {"image_key": None, "label_key": None, "resolution": None, "token_drop": drop, "world_size": 4}
    one = stream(items, 100, None, **options)
    one.set_epoch(0, images_seen=40)
    planner = ImagePlanner(4, 100, token_drop=drop)
    for pack in one:
        for image in pack:
            assert len(image.patches) == planner.plan(image.index, 40, 40, 0, 40 + 4 * image.index).kept


def test_patched_images_are_packed_unchanged() -> None:
    ready = [PatchedImage(torch.randn(length, 48), 1, length, index=length) for length in (60, 50, 40, 50)]
    packs = list(stream(ready, 100, None))
    assert [[image.index for image in pack] for pack in packs] == [[60, 40], [50, 50]]
    assert packs[0][0] is ready[0]


@pytest.mark.parametrize("make", [lambda: ITEMS, Source])
def test_a_stream_goes_on_from_every_state(make: Any, tmp_path: Path) -> None:
    expected = everything(stream(make()))
    for count in range(len(expected) + 1):
        one = stream(make())
        packs = iter(one)
        before = [contents(next(packs)) for _ in range(count)]
        assert before == expected[:count]
        torch.save(one.state_dict(), tmp_path / "state.pt")
        list(packs)
        items = make()
        other = stream(items)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert everything(other) == expected[count:]
        if isinstance(items, Source) and 0 < count < len(expected):
            assert len(items.read) < len(ITEMS)  # what was taken is not read again


def test_an_epoch_after_a_resumed_one_is_whole() -> None:
    one = stream()
    expected = everything(one)
    packs = iter(one)
    next(packs)
    other = stream()
    other.load_state_dict(one.state_dict())
    assert everything(other) == expected[1:]
    assert everything(other) == expected


def test_the_epoch_is_part_of_the_state() -> None:
    one = stream()
    one.set_epoch(3, images_seen=120)
    packs = iter(one)
    next(packs)
    rest_state = one.state_dict()
    other = stream()
    other.load_state_dict(rest_state)
    assert everything(other) == [contents(pack) for pack in packs]


@pytest.mark.parametrize(("items", "divide"), [(ITEMS, "stream"), (Shared(), "items")])
def test_workers_share_the_images(items: Any, divide: str) -> None:
    loader = DataLoader(
        stream(items, divide=divide), None, num_workers=2, collate_fn=PackedImageCollator(110, 5, return_indices=True)
    )
    batches = list(loader)
    labels = torch.cat([batch["labels"] for batch in batches])
    assert sorted(labels[labels >= 0].tolist()) == list(range(40))
    indices = torch.cat([batch["indices"] for batch in batches])
    assert sorted(indices[indices >= 0].tolist()) == list(range(40))  # places differ, so draws do


class IterableDataset(Shared):
    """Named as the class of the datasets library; tests/training_libraries.py has the class itself."""

    __module__ = "datasets.iterable_dataset"


@pytest.mark.parametrize("divide", [None, "stream", "items"])
def test_an_iterable_dataset_of_the_datasets_library_divides_itself(divide: str | None) -> None:
    loader = DataLoader(
        stream(IterableDataset(), divide=divide), None, num_workers=2, collate_fn=PackedImageCollator(110, 5)
    )
    labels = torch.cat([batch["labels"] for batch in loader])
    assert sorted(labels[labels >= 0].tolist()) == list(range(40))


def test_an_iterator_has_one_epoch() -> None:
    one = stream(iter(ITEMS))
    assert sum(map(len, one)) == 40
    with pytest.raises(ValueError, match="`items` is a list_iterator, which an earlier epoch has read"):
        list(one)
    two = stream(ITEMS)
    assert sum(map(len, two)) == sum(map(len, two)) == 40


def test_persistent_workers_see_the_epoch() -> None:
    one = stream(divide="stream")
    loader = DataLoader(one, None, num_workers=2, collate_fn=PackedImageCollator(110, 5), persistent_workers=True)
    kept = []
    for epoch in range(2):
        one.set_epoch(epoch)
        kept.append([batch["cu_seqlens"].tolist() for batch in loader])
    assert kept[0] != kept[1]


def test_several_workers_need_to_know_who_divides() -> None:
    loader = DataLoader(stream(), None, num_workers=2, collate_fn=PackedImageCollator(110, 5))
    with pytest.raises(ValueError, match="`divide` must be 'stream' or 'items' with 2 workers, got None"):
        list(loader)
    assert len(list(DataLoader(stream(), None, num_workers=1, collate_fn=PackedImageCollator(110, 5)))) > 3


def test_no_items_give_no_packs() -> None:
    assert list(stream([])) == []


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="`divide` must be None, 'stream' or 'items', got 'both'"):
        stream(divide="both")
    with pytest.raises(
        ValueError, match="`divide` must not be 'items' for a list, which every worker would read in full"
    ):
        stream(divide="items")
    with pytest.raises(ValueError, match="`items` must be an iterable of images, got a dict; choose a split"):
        stream({"train": ITEMS})
    for name in ("capacity", "max_items", "open_bins"):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1, got 0"):
            stream(**{"resolution": None, name: 0})
    with pytest.raises(ValueError, match="Image 1 keeps 100 patches, which exceeds `capacity`=99"):
        list(
            stream(
                [picture(4, 4), picture(40, 40)], 99, image_key=None, label_key=None, resolution=None, token_drop=None
            )
        )
    with pytest.raises(ValueError, match="`image_key` 'img' is not in item 0"):
        list(stream(image_key="img"))
    state = stream()
    packs = iter(state)
    next(packs)
    with pytest.raises(ValueError, match="length 105"):
        stream(capacity=101, resolution=None, token_drop=None, oversize="shrink").load_state_dict(
            {**state.state_dict(), "open_bins": [{"items": [], "length": 105}]}
        )
