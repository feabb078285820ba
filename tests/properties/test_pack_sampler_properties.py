"""Packs of an epoch: every sample exactly once, whatever the lengths, the limits, the seed and the processes."""

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vlparts.training.dataset import PackSampler

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
OPTIONS = st.fixed_dictionaries(
    {
        "capacity": st.integers(40, 120),
        "max_items": st.none() | st.integers(1, 8),
        "seed": st.integers(0, 2**32),
        "shuffle": st.booleans(),
        "processes": st.integers(1, 5),
    }
)


def epoch_of(sampler: PackSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@given(lengths=LENGTHS, options=OPTIONS, epoch=st.integers(0, 1000))
def test_every_sample_once_within_the_limits(lengths: list[int], options: dict, epoch: int) -> None:
    packs = epoch_of(PackSampler(lengths, **options), epoch)
    assert Counter(index for pack in packs for index in pack) == Counter(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= options["capacity"] for pack in packs)
    assert all(len(pack) <= (options["max_items"] or len(lengths)) for pack in packs)


@given(lengths=LENGTHS, options=OPTIONS)
def test_every_epoch_has_the_announced_number_of_packs(lengths: list[int], options: dict) -> None:
    sampler = PackSampler(lengths, **options)
    announced = len(sampler)
    assert [len(epoch_of(sampler, epoch)) for epoch in range(4)] == [announced] * 4
    assert len(sampler) == announced


@given(lengths=LENGTHS, options=OPTIONS)
def test_packs_are_shared_out_evenly_where_there_are_samples_enough(lengths: list[int], options: dict) -> None:
    packs = len(PackSampler(lengths, **options))
    assert packs % options["processes"] == 0 or packs == len(lengths)
    alone = len(PackSampler(lengths, **{**options, "processes": 1}))
    assert alone <= packs < alone + options["processes"]


@given(lengths=LENGTHS, options=OPTIONS, epoch=st.integers(0, 1000))
def test_an_epoch_depends_on_seed_and_epoch_alone(lengths: list[int], options: dict, epoch: int) -> None:
    """A sampler that went through other epochs before, or through this one in part, gives the same packs."""
    expected = epoch_of(PackSampler(lengths, **options), epoch)
    sampler = PackSampler(lengths, **options)
    for before in range(3):
        epoch_of(sampler, before)
    next(iter(sampler))
    assert epoch_of(sampler, epoch) == expected
    assert list(sampler) == expected


@given(lengths=LENGTHS, options=OPTIONS)
def test_an_epoch_can_be_changed_without_harm_to_the_next(lengths: list[int], options: dict) -> None:
    sampler = PackSampler(lengths, **options)
    packs = list(sampler)
    expected = [list(pack) for pack in packs]
    for pack in packs:
        pack.clear()
    packs.clear()
    assert list(sampler) == expected


@pytest.mark.parametrize("lengths", [[7] * 60, list(range(1, 61))])
def test_epochs_and_seeds_differ(lengths: list[int]) -> None:
    sampler = PackSampler(lengths, 70)
    epochs = [epoch_of(sampler, epoch) for epoch in range(3)] + [epoch_of(PackSampler(lengths, 70, seed=1), 0)]
    for index, first in enumerate(epochs):
        assert all(first != other for other in epochs[:index])


def test_samples_of_equal_length_meet_others_in_every_epoch() -> None:
    sampler = PackSampler([7] * 60, 70)
    first, second = ({frozenset(pack) for pack in epoch_of(sampler, epoch)} for epoch in range(2))
    assert not first & second


def test_without_shuffling_every_epoch_is_the_same_and_in_order() -> None:
    sampler = PackSampler([3, 4, 5, 3, 3], 7, shuffle=False)
    assert epoch_of(sampler, 0) == epoch_of(sampler, 5)
    assert epoch_of(sampler, 0)[0] == [0, 1]


@given(lengths=LENGTHS, options=OPTIONS)
def test_a_sample_longer_than_a_pack_is_an_error(lengths: list[int], options: dict) -> None:
    assume(max(lengths) > 1)
    with pytest.raises(ValueError, match=f"is {max(lengths)}, which exceeds capacity={max(lengths) - 1}"):
        PackSampler([max(lengths), *lengths], **{**options, "capacity": max(lengths) - 1})
