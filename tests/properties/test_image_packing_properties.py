"""What holds for packs of images, whatever the sizes, limits, policies, processes and interruptions."""

import json
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import picture
from torch.utils.data import DataLoader

from vlparts import NaViTImageProcessor
from vlparts.training.images.collator import PackedImageCollator
from vlparts.training.images.packing import PackedImageDataset
from vlparts.training.images.resolution import ResolutionSampler
from vlparts.training.images.sampler import PackedImageSampler
from vlparts.training.images.steps import Pack
from vlparts.training.images.token_drop import BetaDrop, ConstantDrop, ScheduledDrop

SIZES = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=50)
RESOLUTIONS = st.none() | st.builds(ResolutionSampler, st.just(4), st.integers(4, 60))
DROPS = st.none() | st.sampled_from(
    [ConstantDrop(0.0), ConstantDrop(0.999), BetaDrop(0.5, 0.9), ScheduledDrop(0.1, 0.9, 30, -10)]
)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    merge_size = draw(st.integers(1, 2))
    return {
        "patch_size": 4,
        "merge_size": merge_size,
        "capacity": draw(st.integers(merge_size**2, 300)),
        "max_items": draw(st.none() | st.integers(1, 6)),
        "resolution": draw(RESOLUTIONS),
        "token_drop": draw(DROPS),
        "oversize": "shrink",
        "seed": draw(st.integers(0, 2**40)),
        "shuffle": draw(st.booleans()),
        "window": draw(st.integers(1, 4)),
        "open_bins": draw(st.integers(1, 5)),
        "world_size": draw(st.integers(1, 4)),
    }


def plans_of(packs: list[Pack]) -> list[tuple[int, ...]]:
    return [plan for pack in packs for plan in pack]


def check(packs: list[Pack], options: dict[str, Any], sizes: list[tuple[int, int]]) -> None:
    block = options["merge_size"] ** 2
    for pack in packs:
        assert sum(plan.kept for plan in pack) <= options["capacity"]
        assert len(pack) <= (options["max_items"] or len(pack))
        for plan in pack:
            assert 1 <= plan.kept <= plan.rows * plan.columns
            assert plan.kept % block == plan.rows % options["merge_size"] == plan.columns % options["merge_size"] == 0
            assert (plan.height, plan.width) == sizes[plan.index]


@given(SIZES, options())
def test_every_image_once_in_every_epoch(sizes: list[tuple[int, int]], options: dict[str, Any]) -> None:
    ranks = [
        PackedImageSampler(sizes, carry_over=False, rank=rank, **options) for rank in range(options["world_size"])
    ]
    for epoch in range(3):
        parts = [list(one) for one in ranks]
        assert len({len(part) for part in parts}) == 1
        packs = [pack for part in parts for pack in part]
        check(packs, options, sizes)
        assert sorted(plan.index for plan in plans_of(packs)) == list(range(len(sizes)))
        assert {plan.epoch for plan in plans_of(packs)} == {epoch}
        assert sum(not pack for pack in packs) < options["world_size"]


@given(SIZES, options())
def test_no_image_is_lost_or_doubled_when_packs_are_carried_over(
    sizes: list[tuple[int, int]], options: dict[str, Any]
) -> None:
    ranks = [PackedImageSampler(sizes, rank=rank, **options) for rank in range(options["world_size"])]
    packs: list[Pack] = []
    for _ in range(4):
        parts = [list(one) for one in ranks]
        assert len({len(part) for part in parts}) == 1
        packs += [pack for part in parts for pack in part]
    check(packs, options, sizes)
    state = ranks[0].state_dict()
    held = [tuple(plan) for pack in state["open_bins"] + state["waiting"] for plan in pack]
    assert len(state["waiting"]) < options["world_size"]
    assert all(packs)
    shown = Counter((plan[0], plan[6]) for plan in [*plans_of(packs), *held])  # index and epoch
    assert shown == Counter((index, epoch) for index in range(len(sizes)) for epoch in range(4))


@given(SIZES, options(), st.booleans())
def test_processes_get_the_parts_of_one_plan(
    sizes: list[tuple[int, int]], options: dict[str, Any], carry_over: bool
) -> None:
    world_size = options["world_size"]
    ranks = [PackedImageSampler(sizes, carry_over=carry_over, rank=rank, **options) for rank in range(world_size)]
    every = PackedImageSampler(sizes, carry_over=carry_over, rank=0, shard=False, **options)
    for _ in range(2):
        packs = list(every)
        assert [list(one) for one in ranks] == [packs[rank::world_size] for rank in range(world_size)]
        plans = plans_of(packs)
        assert len(set(plans)) == len(plans)


@given(SIZES, options(), st.booleans(), st.integers(0, 200))
def test_a_resumed_sampler_goes_on_as_if_nothing_had_happened(
    sizes: list[tuple[int, int]], options: dict[str, Any], carry_over: bool, consumed: int
) -> None:
    """Also where more was fetched ahead than was consumed."""
    make = {"carry_over": carry_over, "rank": 0, **options}
    whole = PackedImageSampler(sizes, **make)
    epochs = [list(whole) for _ in range(4)]
    first = PackedImageSampler(sizes, **make)
    first.set_epoch(1)
    fetched = list(first)
    assert fetched == epochs[1]
    consumed = min(consumed, len(fetched))
    second = PackedImageSampler(sizes, **make)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(consumed))))
    rest: list[Pack] = []
    while second.epoch < 4:
        rest += list(second)
    assert rest == epochs[1][consumed:] + epochs[2] + epochs[3]


@given(SIZES, options())
def test_a_rate_of_zero_drops_nothing(sizes: list[tuple[int, int]], options: dict[str, Any]) -> None:
    found = [
        list(PackedImageSampler(sizes, carry_over=False, rank=0, **{**options, "token_drop": drop}))
        for drop in (None, ConstantDrop(0.0))
    ]
    assert found[0] == found[1]
    assert all(plan.kept == plan.rows * plan.columns for plan in plans_of(found[0]))


@given(SIZES, options(), st.integers(0, 100))
def test_an_epoch_depends_on_seed_and_epoch_alone(
    sizes: list[tuple[int, int]], options: dict[str, Any], epoch: int
) -> None:
    one = PackedImageSampler(sizes, carry_over=False, rank=0, **options)
    one.set_epoch(epoch)
    expected = list(one)
    other = PackedImageSampler(sizes, carry_over=False, rank=0, **options)
    other.set_epoch(epoch + 3)
    next(iter(other))
    other.set_epoch(epoch)
    assert list(other) == expected


@given(SIZES, options())
def test_batches_have_one_shape_and_hold_every_patch_once(
    sizes: list[tuple[int, int]], options: dict[str, Any]
) -> None:
    """The patches of a batch are those that the plans keep, at places inside of the full grids."""
    sizes, m = sizes[:6], options["merge_size"]
    options = {**options, "max_items": options["max_items"] or 6}
    pictures = [picture(width, height) for height, width in sizes]
    sampler = PackedImageSampler(sizes, carry_over=False, rank=0, **options)
    dataset = PackedImageDataset(pictures, NaViTImageProcessor(patch_size=4, merge_size=m))
    collator = PackedImageCollator(options["capacity"], options["max_items"], merge_size=m)
    for pack in sampler:
        batch = collator(dataset[pack])
        n, rows = options["max_items"], options["capacity"]
        shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        assert shapes == {
            "pixel_values": (rows, 48),
            "image_grid_thw": (n, 3),
            "keep_index": (rows,),
            "cu_seqlens": (n + 2,),
            "position_ids": (rows, 2),
            "image_mask": (n,),
        }
        kept = [plan.kept for plan in pack]
        assert batch["cu_seqlens"].diff().tolist() == kept + [0] * (n - len(pack)) + [rows - sum(kept)]
        places = batch["keep_index"][: sum(kept)]
        assert (places.diff() > 0).all()
        lengths = torch.tensor([plan.rows * plan.columns for plan in pack], dtype=torch.int64)
        owners = torch.searchsorted(lengths.cumsum(0), places, right=True)
        assert torch.bincount(owners, minlength=len(pack)).tolist() == kept
        sides = batch["image_grid_thw"][:, 1:][owners]
        assert ((batch["position_ids"][: sum(kept)] < sides) & (batch["position_ids"][: sum(kept)] >= 0)).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    def batches(count: int) -> list[dict[str, Any]]:
        pictures = [picture(8 + 3 * index, 40 - 2 * index) for index in range(16)]
        sampler = PackedImageSampler(
            [(image.height, image.width) for image in pictures], 4, 100, 5, token_drop=BetaDrop(0.3, 0.6)
        )
        dataset = PackedImageDataset(pictures, NaViTImageProcessor(patch_size=4))
        collator = PackedImageCollator(100, 5, return_indices=True)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, num_workers=count)
        return [batch for _ in range(3) for batch in loader]

    alone, together = batches(0), batches(workers)
    assert len(alone) == len(together) > 3
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)
