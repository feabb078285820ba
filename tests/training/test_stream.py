"""Streams of packs: every record once per epoch, shares, capacity, and states from which they continue exactly."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlparts.training.encoding import Sample
from vlparts.training.records import RecordError
from vlparts.training.shuffled_rows import ShuffledRows
from vlparts.training.stream import PackStream, StreamedPack


class Numbers:
    """Rows that are numbers; their samples have as many tokens as `lengths` says, and none for a broken one."""

    def __init__(self, lengths: list[int], name: str = "numbers", first: int = 0) -> None:
        self.lengths = lengths
        self.name = name
        self.first = first
        self.read = 0

    def rows(self, share: int, shares: int, epoch: int) -> "NumberRows":
        order = range(share, len(self.lengths), shares)
        return NumberRows(self, order if epoch % 2 == 0 else order[::-1])

    def encode(self, row: int) -> Sample:
        length = self.lengths[row - self.first]
        if not length:
            raise RecordError(f"{self.name}, row {row}: broken")
        ids = torch.full((length,), row)
        return Sample(ids, ids, {})


class NumberRows:
    def __init__(self, source: Numbers, order: range) -> None:
        self.source, self.order, self.at = source, order, 0

    def __iter__(self) -> Iterator[int]:
        while self.at < len(self.order):
            self.at += 1
            self.source.read += 1
            yield self.source.first + self.order[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def numbers_of(pack: StreamedPack) -> list[int]:
    """The row of each sample of a pack, with its length."""
    return [int(sample.input_ids[0]) for sample in pack.samples]


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from a file."""
    found: dict[str, Any] = json.loads(json.dumps(state))
    return found


def packs_of(stream: PackStream, count: int) -> list[StreamedPack]:
    return [*islice(stream, count)]


LENGTHS = st.lists(st.integers(1, 10), min_size=4, max_size=40)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 12), st.integers(0, 5))
def test_each_epoch_has_every_row_once(rows: int, shares: int, size: int, seed: int) -> None:
    source = Numbers([1] * rows)
    readers = [ShuffledRows(source, share, shares, size, seed) for share in range(min(shares, rows)) if rows >= shares]
    for epoch in range(3):
        drawn = [reader.draw() for reader in readers for _ in range(len(range(reader.share, rows, shares)))]
        assert sorted(row.value for row in drawn) == [*range(rows)] * bool(readers)
        assert {row.epoch for row in drawn} <= {epoch}


@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 90), st.data())
def test_draws_continue_from_any_state(rows: int, size: int, count: int, data: st.DataObject) -> None:
    reader = ShuffledRows(Numbers([1] * rows), 0, 1, size, seed=3)
    drawn = [reader.draw() for _ in range(count)]
    kept = data.draw(st.lists(st.sampled_from(drawn), unique_by=lambda row: row.number)) if drawn else []
    state = stored(reader.state_dict(kept))
    again = ShuffledRows(Numbers([1] * rows), 0, 1, size, seed=3)
    found = again.load_state_dict(state, [row.number for row in kept])
    assert found == {row.number: row for row in kept}
    assert [again.draw() for _ in range(2 * rows)] == [reader.draw() for _ in range(2 * rows)]


def test_a_state_needs_only_rows_from_the_oldest_one_on() -> None:
    """A state after 50 epochs reads no more than the rows since the oldest row in the buffer."""
    reader = ShuffledRows(Numbers([1] * 100), 0, 1, 10, seed=0)
    for _ in range(100 * 50 + 70):
        reader.draw()
    state, source = reader.state_dict(), Numbers([1] * 100)
    ShuffledRows(source, 0, 1, 10, seed=0).load_state_dict(state)
    assert source.read == state["next"] - min(state["buffer"]) <= 100


def test_rows_are_shuffled_within_the_buffer_anew_in_each_epoch() -> None:
    reader = ShuffledRows(Numbers([1] * 100), 0, 1, 30, seed=0)
    first, second = ([reader.draw().value for _ in range(100)] for _ in range(2))
    assert first != second[::-1]
    assert first != sorted(first)
    assert max(first[:10]) < 30 + 10
    unshuffled = ShuffledRows(Numbers([1] * 9), 0, 1, 1, seed=0)
    assert [unshuffled.draw().value for _ in range(18)] == [*range(9), *range(9)[::-1]]


@given(LENGTHS, st.integers(10, 25), st.sampled_from([None, 1, 3]), st.integers(1, 20))
@settings(max_examples=50)
def test_packs_fit_and_lose_nothing(lengths: list[int], capacity: int, max_items: int | None, buffer: int) -> None:
    """What is not in a pack yet is in an open bin, also across epochs."""
    stream = PackStream([Numbers(lengths)], capacity, max_items, shuffle_buffer=buffer)
    packs = packs_of(stream, 40)
    for pack in packs:
        sizes = [len(sample) for sample in pack.samples]
        assert sizes == sorted(sizes)
        assert 0 < sum(sizes) <= capacity
        assert max_items is None or len(sizes) <= max_items
    counts = Counter(number for pack in packs for number in numbers_of(pack))
    state = packs[-1].state
    waiting = [place for one in (*state["bins"], *state["ready"]) for place in one]
    counts.update(row_of(number, len(lengths)) for _, number, _ in waiting)
    epochs, rest = divmod(state["rows"][0]["next"] - len(state["rows"][0]["buffer"]), len(lengths))
    assert sum(counts.values()) == epochs * len(lengths) + rest
    assert all(epochs <= counts[number] <= epochs + 1 for number in range(len(lengths)))


def row_of(number: int, rows: int) -> int:
    """The row that was read at a number."""
    epoch, at = divmod(number, rows)
    return at if epoch % 2 == 0 else rows - 1 - at


@given(
    st.lists(st.integers(0, 10), min_size=6, max_size=30),
    LENGTHS,
    st.integers(0, 30),
    st.integers(1, 12),
    st.sampled_from([None, 2]),
)
@settings(max_examples=60)
def test_a_stream_continues_from_any_state(
    some_broken: list[int], lengths: list[int], cut: int, buffer: int, max_items: int | None
) -> None:
    some_broken[0] = 3

    def stream() -> PackStream:
        sources = [Numbers(some_broken, "a"), Numbers(lengths, "b", first=1000)]
        options: dict[str, Any] = {"weights": [1, 2.5], "shuffle_buffer": buffer, "on_error": "skip"}
        return PackStream(sources, 25, max_items, **options)

    whole = packs_of(stream(), cut + 20)
    resumed = stream()
    if cut:
        resumed.states = {0: stored(whole[cut - 1].state)}
    again = packs_of(resumed, 20)
    assert [numbers_of(pack) for pack in again] == [numbers_of(pack) for pack in whole[cut:]]
    assert [pack.skipped for pack in again] == [pack.skipped for pack in whole[cut:]]
    assert [pack.state for pack in again] == [pack.state for pack in whole[cut:]]


@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=5), st.integers(1, 300))
@settings(max_examples=50)
def test_shares_are_kept_at_all_times(weights: list[float], count: int) -> None:
    """Broken records do not count."""
    sources = [Numbers([1, 0, 1], str(index), first=10 * index) for index in range(len(weights))]
    packs = packs_of(PackStream(sources, 1, weights=weights, shuffle_buffer=2, on_error="skip"), count)
    drawn = Counter(number // 10 for pack in packs for number in numbers_of(pack))
    assert packs[-1].state["counts"] == [drawn[index] for index in range(len(weights))]
    for index, weight in enumerate(weights):
        assert abs(drawn[index] - count * weight / sum(weights)) < len(weights)


def test_workers_of_processes_share_the_records_and_take_turns_from_where_they_were() -> None:
    """Each of 2 processes with 2 workers has a quarter; a state of 3 packs continues with the second worker."""

    def loader(process: int, state: dict[int, Any] | None = None, first: int = 0) -> Iterator[StreamedPack]:
        stream = PackStream([Numbers([1] * 20)], 1, shuffle_buffer=3, process=process, processes=2)
        stream.states, stream.first = state or {}, first
        return iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2))

    seen: list[list[int]] = []
    for process in range(2):
        packs = [*islice(loader(process), 10 + 6)]
        assert [pack.stream for pack in packs] == [0, 1] * 8
        seen += [numbers_of(pack) for pack in packs[:10]]
        states = {pack.stream: pack.state for pack in packs[:3]}
        again = [*islice(loader(process, states, 3 % 2), 13)]
        assert [numbers_of(pack) for pack in again] == [numbers_of(pack) for pack in packs[3:]]
    assert sorted(seen) == [[number] for number in range(20)]


def test_broken_records_end_the_stream_or_are_named() -> None:
    lengths = [2, 0, 2, 2]
    packs = packs_of(PackStream([Numbers(lengths)], 2, shuffle_buffer=1), 5)
    assert [str(pack.error) for pack in packs] == ["None", "numbers, row 1: broken"]
    packs = packs_of(PackStream([Numbers(lengths)], 2, shuffle_buffer=1, on_error="skip"), 6)
    assert [bool(pack.skipped) for pack in packs] == [False, True, False, False, False, True]
    assert packs[1].skipped == packs[5].skipped == ["numbers, row 1: broken"]


def test_a_source_without_valid_records_ends_the_stream() -> None:
    packs = packs_of(PackStream([Numbers([0, 0])], 2, on_error="skip"), 5)
    message = "numbers: expected at least one valid record for each reader, got none in an epoch. Last skipped: "
    assert [str(pack.error)[: -len("numbers, row 0: broken")] for pack in packs] == [message]


def test_fewer_records_than_readers_are_refused() -> None:
    stream = PackStream([Numbers([1, 1, 1])], 2, process=3, processes=4)
    error = str(packs_of(stream, 3)[0].error)
    assert error.startswith("numbers: expected at least one row for each of 4 readers")
    assert "got none for reader 4" in error


@pytest.mark.parametrize("shorter", [[2, 2], [2, 2, 3]])
def test_data_that_changed_is_refused(shorter: list[int]) -> None:
    state = packs_of(PackStream([Numbers([2, 2, 2])], 5, shuffle_buffer=3), 1)[0].state
    stream = PackStream([Numbers(shorter)], 5, shuffle_buffer=3)
    stream.states = {0: state}
    assert str(packs_of(stream, 3)[0].error).startswith("numbers has changed: expected")


BAD = [
    ({"sources": []}, "`sources` must have at least one source"),
    ({"weights": [1, 2]}, "`weights` must be a positive number for each of 1 sources"),
    ({"weights": [0]}, "`weights` must be a positive number"),
    ({"weights": [float("nan")]}, "`weights` must be a positive number"),
    ({"capacity": 0}, "`capacity` must be"),
    ({"max_items": 0}, "`max_items` must be"),
    ({"shuffle_buffer": 0}, "`shuffle_buffer` must be"),
    ({"on_error": "ignore"}, "`on_error` must be 'raise' or 'skip'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackStream(**{"sources": [Numbers([1])], "capacity": 5, **changes})
