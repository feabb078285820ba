"""States of a sampler: training goes on as if it had not been interrupted."""

import json
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.training.images.test_sampler import epochs_of, sampler, state_after
from vlparts.training.images import sampler as image_sampler
from vlparts.training.images.plan import ImagePlan
from vlparts.training.images.sampler import PackedImageSampler
from vlparts.training.images.steps import Pack


class Indices:
    """A dataset whose items are the plans themselves."""

    def __getitem__(self, pack: Pack) -> Pack:
        return pack

    __getitems__ = __getitem__


def as_they_are(batch: Any) -> Any:
    return batch


def loader(one: PackedImageSampler, workers: int, batch_sampler: bool) -> DataLoader:
    place = {"batch_sampler": one} if batch_sampler else {"sampler": one, "batch_size": None}
    return DataLoader(Indices(), num_workers=workers, collate_fn=as_they_are, **place)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_sampler", [True, False])
def test_training_goes_on_from_what_was_consumed(workers: int, batch_sampler: bool) -> None:
    """As in a training loop: a state is saved in the middle of an epoch while workers fetch ahead."""
    options = {"world_size": 2, "rank": 1, "window": 3, "count": 200}
    one = sampler(**options)
    expected = [pack for packs in epochs_of(sampler(**options), 3) for pack in packs]
    seen, saved = [], None
    while one.epoch < 3:
        for step, pack in enumerate(loader(one, workers, batch_sampler), start=1):
            seen.append([ImagePlan(*plan) for plan in pack])
            if len(seen) == len(expected) // 2:
                saved = json.dumps(one.state_dict(step)), len(seen)
    assert seen == expected
    assert saved is not None
    state, consumed = json.loads(saved[0]), saved[1]
    other = sampler(**options)
    other.load_state_dict(state)
    rest = []
    while other.epoch < 3:
        rest += [[ImagePlan(*plan) for plan in pack] for pack in loader(other, workers, batch_sampler)]
    assert rest == expected[consumed:]


def test_the_state_of_what_was_handed_out_is_the_default() -> None:
    one = sampler(200)
    for count, _ in enumerate(one, start=1):
        assert one.state_dict() == one.state_dict(count)
    assert one.state_dict()["epoch"] == 1


def test_a_state_is_the_same_on_every_process() -> None:
    states = []
    for options in ({"rank": 0}, {"rank": 2}, {"rank": 0, "shard": False}):
        one = sampler(300, world_size=3, **options)
        states.append(state_after(one, 5))
    assert states[0] == states[1] == states[2]


def test_choosing_the_epoch_of_a_loaded_state_keeps_its_place() -> None:
    """Training loops call `set_epoch` before each epoch, the resumed one included."""
    one = sampler(200)
    epochs = epochs_of(one, 2)
    one.set_epoch(1)
    other = sampler(200)
    other.load_state_dict(state_after(one, 3))
    other.set_epoch(1)
    assert list(other) == epochs[1][3:]


def test_states_are_not_disturbed_by_what_becomes_of_packs() -> None:
    expected = list(sampler(300, window=2, world_size=2, rank=0))
    one = sampler(300, window=2, world_size=2, rank=0)
    for count, pack in enumerate(one, start=1):
        pack.clear()
        if count > 8:
            other = sampler(300, window=2, world_size=2, rank=0)
            other.load_state_dict(one.state_dict(count - 7))
            assert list(other) == expected[count - 7 :]


def test_a_state_of_a_resumed_iteration() -> None:
    """States are taken, loaded and taken again."""
    expected = list(sampler(200))
    one = sampler(200)
    for start in range(0, len(expected) - 3, 3):
        packs = iter(one)
        assert [next(packs) for _ in range(3)] == expected[start : start + 3]
        state = one.state_dict()
        one = sampler(200)
        one.load_state_dict(state)
        assert one.state_dict() == state


def test_steps_that_were_not_handed_out_have_no_state() -> None:
    one = sampler(200)
    packs = iter(one)
    next(packs)
    for consumed in (-1, 2):
        with pytest.raises(
            ValueError,
            match=f"`consumed` must be at most the 1 steps .* got {consumed}",
        ):
            one.state_dict(consumed)
    assert one.state_dict(0)["skip"] == 0


def test_old_states_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sampler, "HISTORY_STEPS", 5)
    one = sampler(300, window=2)
    for count, _ in enumerate(one, start=1):
        assert one.state_dict(max(0, count - 5))["epoch"] == 0
        if count > 12:
            with pytest.raises(ValueError, match=f"`consumed` must be .* within the last 5 of them, got {count - 10}"):
                one.state_dict(count - 10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 61),
        ("capacity", 257),
        ("max_items", 9),
        ("seed", 1),
        ("world_size", 2),
        ("shuffle", False),
        ("window", 3),
        ("hidden_size", 8),
        ("carry_over", False),
        ("open_bins", 3),
        ("oversize", "shrink"),
    ],
)
def test_a_state_of_other_settings_is_refused(name: str, value: Any) -> None:
    state = sampler(rank=0).state_dict()
    shown = "num_images" if name == "count" else name
    with pytest.raises(ValueError, match=f"`state` must be of a sampler with {shown}={value!r}, got "):
        sampler(rank=0, **{name: value}).load_state_dict(state)
