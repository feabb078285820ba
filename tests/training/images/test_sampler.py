"""Packs of images for a DataLoader: epochs, processes, states, and what is refused."""

import copy
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed

from vlparts.training.images.balance import encoder_work
from vlparts.training.images.resolution import ResolutionSampler
from vlparts.training.images.sampler import PackedImageSampler
from vlparts.training.images.steps import Pack
from vlparts.training.images.token_drop import BetaDrop, ScheduledDrop

DRAWS = {"resolution": ResolutionSampler(64, 256), "token_drop": BetaDrop(0.5, 0.9)}


def paper_sizes(count: int, seed: int = 0) -> np.ndarray:
    """Height and width of images with log-normal aspect ratios."""
    aspects = np.exp(np.random.default_rng(seed).normal(0, 0.35, count) / 2)
    return np.rint(np.stack([300 / aspects, 300 * aspects], axis=1)).astype(np.int64)


def sampler(count: int = 60, capacity: int = 256, **options: Any) -> PackedImageSampler:
    return PackedImageSampler(paper_sizes(count), 16, capacity, **{**DRAWS, **options})


def epochs_of(one: PackedImageSampler, count: int) -> list[list[Pack]]:
    return [list(one) for _ in range(count)]


def used(packs: list[Pack]) -> int:
    return sum(plan.kept for pack in packs for plan in pack)


# --- padding and epochs


@pytest.mark.parametrize("token_drop", [None, BetaDrop(0.5, 0.9)])
@pytest.mark.parametrize("carry_over", [True, False])
def test_little_is_padded_on_the_lengths_of_the_paper(token_drop: Any, carry_over: bool) -> None:
    one = sampler(5000, 512, token_drop=token_drop, carry_over=carry_over)
    packs = list(one)
    assert 1 - used(packs) / (512 * len(packs)) < 0.02


def test_carried_images_come_in_the_next_epoch() -> None:
    one = sampler(300)
    shown = [Counter(plan for pack in packs for plan in pack) for packs in epochs_of(one, 6)]
    assert max(count for counter in shown for count in counter.values()) == 1
    by_epoch = [Counter(plan.epoch for plan in counter) for counter in shown]
    assert all(set(counter) <= {number - 1, number} for number, counter in enumerate(by_epoch))
    for epoch in range(5):  # what an epoch lacks, the next one begins with
        assert by_epoch[epoch][epoch] + by_epoch[epoch + 1][epoch] == 300
        assert by_epoch[epoch + 1][epoch] > 0


def test_a_dataset_that_fills_no_pack_needs_several_epochs() -> None:
    one = sampler(3, 2048)
    epochs = epochs_of(one, 60)
    assert epochs[0] == []
    plans = [plan for packs in epochs for pack in packs for plan in pack]
    assert len(plans) == len(set(plans)) > 60
    assert len(list(sampler(3, 2048, carry_over=False))) == 1


def test_without_shuffling_images_keep_their_order() -> None:
    one = PackedImageSampler([(16, 16 * width) for width in (3, 4, 5, 3, 3)], 16, 7, shuffle=False, carry_over=False)
    first = list(one)
    assert [[plan.index for plan in pack] for pack in first] == [[0, 1], [2], [3, 4]]
    assert [[plan.index for plan in pack] for pack in one] == [[0, 1], [2], [3, 4]]


def test_epochs_seeds_and_images_differ() -> None:
    epochs = [*epochs_of(sampler(carry_over=False), 3), list(sampler(carry_over=False, seed=1))]
    orders = [tuple(plan.index for pack in packs for plan in pack) for packs in epochs]
    assert len(set(orders)) == 4
    lengths = [tuple(plan.kept for plan in sorted(plan for pack in packs for plan in pack)) for packs in epochs]
    assert len(set(lengths)) == 4


def test_schedules_see_the_images_planned_before() -> None:
    """Deterministic rates tell the number of images seen."""
    drop = ScheduledDrop(0.0, 0.99, midpoint=90, timescale=20)
    one = PackedImageSampler([(160, 160)] * 60, 16, 100, token_drop=drop, shuffle=False)
    for _ in range(3):
        assert one.images_seen == one.epoch * 60
        for pack in one:
            for plan in pack:
                seen = plan.epoch * 60 + plan.index
                assert plan.kept == max(1, 100 - math.floor(100 * drop.mean_rate(seen)))


@pytest.mark.parametrize("carry_over", [True, False])
def test_an_epoch_can_be_chosen(carry_over: bool) -> None:
    epochs = epochs_of(sampler(carry_over=carry_over), 4)
    one = sampler(carry_over=carry_over)
    for epoch in (2, 0, 3, 1, 1):
        one.set_epoch(epoch)
        assert one.epoch == epoch
        assert list(one) == epochs[epoch]
    with pytest.raises(ValueError, match="`epoch` must be at least 0, got -1"):
        one.set_epoch(-1)


def test_an_iteration_that_was_broken_off_starts_again() -> None:
    one = sampler(300)
    expected = list(sampler(300))
    packs = iter(one)
    first = next(packs)
    first.clear()  # what is handed out may be changed
    assert one.epoch == 0
    assert list(one) == expected
    assert next(packs, None) is not None  # the old iteration does not disturb the new epoch
    list(packs)
    assert one.epoch == 1
    packs = iter(one)
    next(packs)
    one.set_epoch(3)
    list(packs)
    assert one.epoch == 3


def test_the_length_is_that_of_the_next_iteration() -> None:
    for options in ({}, {"world_size": 3, "rank": 1}, {"world_size": 3, "rank": 1, "shard": False}):
        one = sampler(200, **options)
        for _ in range(3):
            announced = len(one)
            packs = iter(one)
            taken = [next(packs)]
            assert len(one) == announced
            taken += packs
            assert len(taken) == announced
        one.load_state_dict(state_after(one, 1))
        assert len(one) == len(list(one))


def state_after(one: PackedImageSampler, steps: int) -> dict[str, Any]:
    iter(one)
    packs = iter(one)
    for _ in range(steps * (1 if one.shard else one.world_size)):
        next(packs)
    return one.state_dict()


def test_sizes_can_be_a_function() -> None:
    sizes = paper_sizes(60)
    asked = []

    def size_of(index: int) -> tuple[int, int]:
        asked.append(index)
        return tuple(sizes[index].tolist())

    one = PackedImageSampler(size_of, 16, 256, num_images=60, **DRAWS)
    assert asked == []
    expected = list(sampler())
    assert list(one) == expected
    assert set(asked) == set(range(60))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])  # noqa: S301
def test_a_copy_goes_its_own_way(copied: Any) -> None:
    one = sampler()
    list(one)
    other = copied(one)
    expected = list(one)
    assert list(other) == expected


# --- processes


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("carry_over", [True, False])
def test_processes_share_one_plan(world_size: int, carry_over: bool) -> None:
    options = {"carry_over": carry_over, "world_size": world_size, "window": 2, "capacity": 300}
    ranks = [sampler(90, rank=rank, **options) for rank in range(world_size)]
    together = sampler(90, rank=0, shard=False, **options)
    alone = [frozenset(pack) for packs in epochs_of(sampler(90, **{**options, "world_size": 1}), 4) for pack in packs]
    joined = []
    for _ in range(3):
        parts = [list(one) for one in ranks]
        assert len({len(part) for part in parts}) == 1
        steps = [list(step) for step in zip(*parts, strict=True)]
        assert [pack for step in steps for pack in step] == list(together)
        joined += [frozenset(pack) for step in steps for pack in step]
    plans = [plan for pack in joined for plan in pack]
    assert len(plans) == len(set(plans))
    if carry_over:  # the same packs, whatever the number of processes
        assert set(joined) <= set(alone)
    else:
        assert len(plans) == 3 * 90


def test_similar_work_shares_a_step() -> None:
    def waiting(packs: list[Pack]) -> float:
        works = np.array([encoder_work([plan.kept for plan in pack], 384) for pack in packs], dtype=float)
        steps = works[: len(works) // 8 * 8].reshape(-1, 8)
        return float(steps.max(1).sum() / steps.mean(1).sum())

    options: dict[str, Any] = {"resolution": ResolutionSampler(64, 768), "token_drop": None, "hidden_size": 384}
    naive = waiting(list(sampler(2000, 2304, **options)))
    balanced = waiting(list(sampler(2000, 2304, world_size=8, rank=0, shard=False, **options)))
    assert balanced - 1 < (naive - 1) / 5
    works = [encoder_work([plan.kept for plan in pack], 384) for pack in sampler(2000, 2304, world_size=1, **options)]
    assert works != sorted(works)  # steps are not in the order of their work


def test_no_process_always_gets_the_most_work() -> None:
    one = sampler(1000, world_size=4, rank=0, shard=False)
    packs = list(one)
    works = np.array([encoder_work([plan.kept for plan in pack], 768) for pack in packs]).reshape(-1, 4)
    assert set(works.argmax(1)) == {0, 1, 2, 3}


def test_the_last_packs_are_halved_for_all_processes() -> None:
    one = PackedImageSampler([(16, 16)] * 7, 16, 7, world_size=4, rank=0, shard=False, carry_over=False)
    assert sorted(len(pack) for pack in one) == [1, 2, 2, 2]


def test_packs_are_held_back_so_that_some_can_be_halved() -> None:
    sizes = [(16, 16), (16, 16), (16, 32), (16, 32)]
    one = PackedImageSampler(
        sizes, 16, 2, world_size=2, rank=0, shard=False, carry_over=False, shuffle=False, window=1
    )
    assert sorted([plan.index for plan in pack] for pack in one) == [[0], [1], [2], [3]]


def test_a_process_without_an_image_gets_an_empty_pack() -> None:
    options = {"world_size": 4, "carry_over": False}
    parts = [list(PackedImageSampler([(16, 16)] * 6, 16, 1, rank=rank, **options)) for rank in range(4)]
    assert [len(part) for part in parts] == [2] * 4
    sizes = sorted(len(pack) for part in parts for pack in part)
    assert sizes == [0, 0, 1, 1, 1, 1, 1, 1]


def test_rank_and_world_size_are_those_of_torch_distributed(tmp_path: Path) -> None:
    assert (sampler().rank, sampler().world_size) == (0, 1)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("fake", store=store, rank=1, world_size=3)
    try:
        one = sampler()
        assert (one.rank, one.world_size) == (1, 3)
        assert list(one) == list(sampler(rank=1, world_size=3))
    finally:
        torch.distributed.destroy_process_group()


# --- what is refused


@pytest.mark.parametrize("name", ["patch_size", "capacity", "max_items", "merge_size", "hidden_size", "window"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_limits_must_be_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
        PackedImageSampler([(16, 16)], **{"patch_size": 16, "capacity": 10, name: value})


@pytest.mark.parametrize("value", [0, -1])
def test_open_bins_must_be_positive(value: int) -> None:
    with pytest.raises(ValueError, match="`open_bins` must be an integer of at least 1"):
        sampler(open_bins=value)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0), (1, None)])
def test_a_rank_must_exist(rank: int, world_size: int | None) -> None:
    with pytest.raises(ValueError, match=rf"`rank` must be in 0\.\.world_size - 1, got rank={rank}"):
        sampler(rank=rank, world_size=world_size)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([], {}, "`sizes` must have the height and width of at least one image, got none"),
        ([(16, 0)], {}, r"`sizes\[0\]` must have .* got \(16, 0\)"),
        ([(16, 16), (160, 176)], {}, "Image 1 keeps 110 patches, which exceeds `capacity`=100"),
        (lambda index: (16, 16), {}, "`num_images` is required if `sizes` is a function"),
        (lambda index: (16, 16), {"num_images": 0}, "`num_images` must be an integer of at least 1"),
        ([(16, 16)], {"num_images": 2}, "`num_images` must be the length of `sizes`, 1, got 2"),
    ],
)
def test_sizes_that_are_refused_at_once(sizes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedImageSampler(sizes, 16, 100, **options)


@pytest.mark.parametrize("size", [(16, 0), (16,), None, (16.0, 16.0), (16, 16, 3)])
def test_a_function_must_return_a_size(size: Any) -> None:
    one = PackedImageSampler(lambda index: size, 16, 100, num_images=3)
    with pytest.raises(ValueError, match=r"`sizes\(\d\)` must be a height and a width in pixels, both at least 1"):
        next(iter(one))
