"""Shares of sources: together every row once per epoch, of any number of readers, and states of all kinds of data."""

import io
import json
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from tests.training.making import write_records
from vlparts.training.encoding import Sample
from vlparts.training.records import Record, RecordError
from vlparts.training.sources import open_source
from vlparts.training.stream import PackStream
from vlparts.training.stream_source import StreamSource


def row_of(index: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": str(index)}]}


def encode(record: Record, number: int) -> Sample:
    """A sample whose token is the number in the answer."""
    block: Any = record.messages[-1].content[0]
    ids = torch.tensor([int(block.text)])
    return Sample(ids, ids, {})


def rows_of(numbers: list[int]) -> Iterator[dict[str, Any]]:
    yield from map(row_of, numbers)


def data_of(kind: str, rows: int, folder: Path) -> Any:
    """Data with a number of rows, of which some kinds have several shards."""
    if kind == "json":
        return write_records(folder / "data.jsonl", [row_of(index) for index in range(rows)])
    if kind == "generator":
        return IterableDataset.from_generator(rows_of, gen_kwargs={"numbers": list(range(rows))})
    if kind == "dataset":
        return Dataset.from_list([row_of(index) for index in range(rows)])
    if kind == "tar":
        for shard in range(2):
            with tarfile.open(folder / f"{shard}.tar", "w") as file:
                for index in range(shard, rows, 2):
                    content = json.dumps(row_of(index)).encode()
                    member = tarfile.TarInfo(f"{index}.json")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
        return folder / "*.tar"
    (folder / "parquet").mkdir(exist_ok=True)
    for shard in range(3):
        part = Dataset.from_list([row_of(index) for index in range(shard, rows, 3)])
        part.to_parquet(folder / "parquet" / f"{shard}.parquet", batch_size=4)
    return folder / "parquet"


KINDS = ("json", "parquet", "dataset", "generator", "tar")


def source_of(kind: str, rows: int, folder: Path) -> StreamSource:
    return StreamSource(open_source(data_of(kind, rows, folder), streaming=True), encode, seed=1)


def read(source: StreamSource, share: int, shares: int, epoch: int) -> list[int]:
    return [int(source.encode(row).input_ids[0]) for row in source.rows(share, shares, epoch)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shares", [1, 2, 3, 5, 7])
def test_readers_have_every_row_once_in_each_epoch(tmp_path: Path, kind: str, shares: int) -> None:
    source = source_of(kind, 21, tmp_path)
    read_by = [[read(source, share, shares, epoch) for share in range(shares)] for epoch in range(3)]
    for epoch in read_by:
        assert sorted(number for share in epoch for number in share) == [*range(21)]
    if kind in ("parquet", "json"):
        assert read_by[0] != read_by[1] != read_by[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("share", "shares"), [(0, 1), (1, 2), (4, 5)])
def test_rows_continue_from_any_state(tmp_path: Path, kind: str, share: int, shares: int) -> None:
    source = source_of(kind, 23, tmp_path)
    whole = read(source, share, shares, 1)
    for count in range(len(whole) + 1):
        rows = source.rows(share, shares, 1)
        assert len([*islice(rows, count)]) == count
        again = source.rows(share, shares, 1)
        again.load_state_dict(json.loads(json.dumps(rows.state_dict())))
        assert [int(source.encode(row).input_ids[0]) for row in again] == whole[count:]


def test_workers_have_shares_of_one_shard(tmp_path: Path) -> None:
    """A dataset of the library that is iterated in a worker would leave it out."""
    stream = PackStream([source_of("parquet", 21, tmp_path)], 1, shuffle_buffer=2)
    packs = [*islice(DataLoader(stream, batch_size=None, num_workers=3), 21)]
    assert sorted(int(pack.samples[0].input_ids[0]) for pack in packs) == [*range(21)]


def test_errors_name_the_line_or_the_shard_and_row(tmp_path: Path) -> None:
    write_records(tmp_path / "data.jsonl", [row_of(0), {"messages": []}, row_of(2)])
    lines = StreamSource(open_source(tmp_path / "data.jsonl", streaming=True), encode, 0)
    broken = IterableDataset.from_generator(broken_rows, gen_kwargs={"shards": [0, 1]})
    columns = StreamSource(open_source(broken, streaming=True), encode, 0)
    for source, place in ((lines, f"{tmp_path}/data.jsonl, line 2"), (columns, "`data`, shard 1, row 2")):
        found = []
        for row in source.rows(0, 1, 0):
            try:
                source.encode(row)
            except RecordError as error:
                found.append(str(error))
        [message] = found
        assert message.startswith(f"{place}: ")


def broken_rows(shards: list[int]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        yield from (row_of(0), row_of(1), row_of(2) if shard == 0 else row_of(2) | {"messages": []})


def test_weights_are_those_of_the_records(tmp_path: Path) -> None:
    write_records(tmp_path / "data.jsonl", [row_of(0), row_of(1) | {"importance": 0.5}])
    data = open_source(tmp_path / "data.jsonl", streaming=True, sample_weight_field="importance")
    source = StreamSource(data, encode, 0)
    assert sorted(source.encode(row).weight for row in source.rows(0, 1, 0)) == [0.5, 1.0]


def test_data_that_cannot_continue_are_refused(tmp_path: Path) -> None:
    shuffled = data_of("generator", 5, tmp_path).shuffle(seed=0)
    with pytest.raises(ValueError, match="`data` must not be shuffled by `IterableDataset.shuffle`.*`shuffle_buffer`"):
        StreamSource(open_source(shuffled, streaming=True), encode, 0)
    divided = split_dataset_by_node(data_of("generator", 5, tmp_path), 0, 2)
    with pytest.raises(ValueError, match="`data` must not be divided by `split_dataset_by_node`"):
        StreamSource(open_source(divided, streaming=True), encode, 0)
    with pytest.raises(ValueError, match="`source` must be opened with streaming=True, got a Dataset"):
        StreamSource(open_source(data_of("json", 5, tmp_path)), encode, 0)
