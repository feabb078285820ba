"""Data of every kind becomes the same records."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image

from tests.tiny import picture
from tests.training.making import processor_for, save, write_records
from vlparts.training.dataset import SampleDataset
from vlparts.training.encoding import SampleEncoder
from vlparts.training.records import Record, RecordError
from vlparts.training.sources import Source, open_source

SIZES = [(20, 12), (12, 8), (16, 16)]


def png(index: int) -> bytes:
    file = io.BytesIO()
    picture(*SIZES[index], seed=index).save(file, "PNG")
    return file.getvalue()


def turns(index: int, blocks: bool = True) -> list[dict[str, Any]]:
    """TRL's messages; with `blocks` of contents of one type, as Arrow has them."""
    question: Any = [{"type": "image"}, {"type": "text", "text": f"What is {index}?"}]
    answer: Any = [{"type": "text", "text": f"cat {index}"}] if blocks else f"cat {index}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Records with the images in `images` in one of the ways that there are."""
    images = {
        "path": lambda index: save(folder, f"{index}.png", picture(*SIZES[index], seed=index)),
        "bytes": png,
        "struct": lambda index: {"bytes": png(index), "path": None},
        "pillow": lambda index: Image.open(io.BytesIO(png(index))),
    }
    return [{"images": [images[kind](index)], "messages": turns(index)} for index in range(3)]


def tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """A shard of samples: content by extension."""
    with tarfile.open(path, "w") as shard:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"part/{number:03}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


def made(folder: Path, kind: str) -> Any:
    """The three records as data of a kind."""
    struct = Dataset.from_list(rows(folder, "struct"))
    if kind == "jsonl":
        return write_records(folder / "a.jsonl", rows(folder, "path"))
    if kind == "tar":
        sample = [{"png": png(index), "json": json.dumps({"messages": turns(index)}).encode()} for index in range(3)]
        tar(folder / "1.tar", sample[2:])
        tar(folder / "0.tar", sample[:2])
        return folder / "?.tar"
    if kind in ("parquet", "parquet folder"):
        (folder / "data").mkdir()
        struct.to_parquet(folder / "data" / "a.parquet")
        return folder / "data" / "a.parquet" if kind == "parquet" else folder / "data"
    if kind in ("saved", "arrow"):
        struct.save_to_disk(folder / "saved")
        return folder / "saved" if kind == "saved" else next((folder / "saved").glob("*.arrow"))
    return Dataset.from_list(rows(folder, kind))


KINDS = ["jsonl", "tar", "parquet", "parquet folder", "saved", "arrow", "path", "bytes", "struct", "pillow"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_samples(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # paths of a dataset are relative to the working directory
    processor = processor_for()
    wanted = SampleDataset(
        open_source(write_records(tmp_path / "wanted.jsonl", rows(tmp_path, "path"))),
        SampleEncoder(processor, tmp_path),
        progress=False,
    )[range(3)]
    data = made(tmp_path, kind)
    source = open_source(data)
    found = SampleDataset(source, SampleEncoder(processor, source.records.root), progress=False)
    for one, other in zip(found[range(3)], wanted, strict=True):
        assert one.input_ids.equal(other.input_ids)
        assert one.labels.equal(other.labels)
        assert all(one.images[name].equal(value) for name, value in other.images.items())
    streamed = open_source(data, streaming=True)
    assert isinstance(streamed.rows, IterableDataset)
    records = [line.record for line in source.lines()]
    assert [line.record.messages for line in streamed.lines()] == [one.messages for one in records]
    assert [line.record.all_images for line in streamed.lines()] == [one.all_images for one in records]
    assert open_source(data).identity == source.identity


def test_a_stream_goes_on_from_its_state(tmp_path: Path) -> None:
    for kind in ("jsonl", "tar"):
        rows_of = open_source(made(tmp_path, kind), streaming=True).rows
        stream = iter(rows_of)
        first = next(stream)
        state = rows_of.state_dict()
        rest = list(stream)
        rows_of.load_state_dict(state)
        assert list(rows_of) == rest
        assert first not in rest


def only(data: Any, **options: Any) -> Record:
    (line,) = open_source(data, **options).lines()
    assert isinstance(line.record, Record)
    return line.record


QUESTION, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
PLAIN = Record.model_validate({"messages": [QUESTION, ANSWER]})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": "Hi", "completion": "Hello."},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "id": "7"},
        {"messages": [{**QUESTION, "tool_calls": None}, ANSWER], "image": None, "images": None},
    ],
)
def test_columns_of_every_shape(row: dict[str, Any]) -> None:
    assert only(Dataset.from_list([row])) == PLAIN


def test_nulls_of_columns_are_keys_that_are_not_there(tmp_path: Path) -> None:
    """Arrow gives all structs of a column the same keys; in JSON a null is the user's own."""
    blocks = [{"type": "image"}, {"type": "text", "text": "a"}, {"label": "cat", "box": [1, 2, 3, 4]}]
    row = {"image": "a.png", "messages": [QUESTION, {"role": "assistant", "content": blocks}]}
    asked = [{"type": "text", "text": "Hi"}]
    arrow = {"image": "a.png", "messages": [{"role": "user", "content": asked}, row["messages"][1]]}
    data = Dataset.from_list([arrow])
    assert data[0]["messages"][1]["content"][0]["text"] is None
    assert only(data).messages[1] == Record.model_validate(row).messages[1]
    nulls = Dataset.from_list([{"messages": [{"role": "assistant", "content": None}, ANSWER]}])
    with pytest.raises(RecordError, match=r"`data`, row 0: messages\.0\.content: Field required"):
        only(nulls)
    path = write_records(tmp_path / "a.jsonl", [{"messages": [QUESTION, {"role": "assistant", "content": None}]}])
    with pytest.raises(RecordError, match=r"a\.jsonl, line 1: .*got None"):
        only(path)


def test_columns_that_are_unknown_are_named_and_can_be_renamed_or_ignored(tmp_path: Path) -> None:
    data = Dataset.from_list([{"dialog": [QUESTION, ANSWER], "source": "web"}])
    with pytest.raises(ValueError, match="has the columns 'dialog', 'source', which no training record has"):
        open_source(data)
    assert only(data, columns={"messages": "dialog"}, ignore_columns=["source"]) == PLAIN
    path = write_records(tmp_path / "a.jsonl", [{"dialog": [QUESTION, ANSWER], "source": "web"}])
    assert only(path, columns={"messages": "dialog"}, ignore_columns=["source"]) == PLAIN
    with pytest.raises(ValueError, match="must name columns of `data`, which are 'dialog', 'source', got 'talk'"):
        open_source(data, columns={"messages": "talk"})
    both = write_records(tmp_path / "b.jsonl", [{"dialog": [QUESTION], "messages": [QUESTION, ANSWER]}])
    with pytest.raises(RecordError, match="has 'messages' beside what `columns` gives this name"):
        only(both, columns={"messages": "dialog"})


PROMPT = {"prompt": [QUESTION, ANSWER], "completion": [ANSWER]}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "answer in the prompt": (PROMPT, "'prompt' has a turn of the assistant, which would have a loss"),
    "question in the completion": ({"completion": [QUESTION]}, "'completion' must have turns of the assistant only"),
    "completion and messages": (
        {"completion": [ANSWER], "messages": [QUESTION]},
        "must have either 'messages' or 'completion', got both",
    ),
    "image of a number": ({"image": 3, "messages": [QUESTION, ANSWER]}, "image: Input should be a valid string"),
    "image without content": (
        {"image": {"bytes": None, "path": None}, "messages": [QUESTION, ANSWER]},
        "image: Input should be a valid string",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_named_by_their_position(name: str) -> None:
    row, message = BROKEN[name]
    with pytest.raises(RecordError, match=f"`data`, row 0: .*{message}"):
        only(IterableDataset.from_generator(lambda: iter([row])), streaming=True)


def test_captions_in_shards(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [{"png": png(0), "txt": b"a cat\n", "json": b'{"url": "x"}'}])
    with pytest.raises(RecordError, match=r"a\.tar, sample part/000: .* either 'json' or 'txt', got txt and json"):
        only(path)
    record = only(path, ignore_columns=["json"])
    assert [message.role for message in record.messages] == ["user", "assistant"]
    assert record.messages[1].content[0].text == "a cat"
    assert len(record.all_images) == 1


def test_images_of_a_shard_can_be_named(tmp_path: Path) -> None:
    content = {"images": ["b.png", "a.png"], "messages": [QUESTION, ANSWER]}
    files = {"a.png": png(0), "b.png": png(1), "json": json.dumps(content).encode()}
    record = only(tar(tmp_path / "a.tar", [files]))
    assert [one.data for one in record.all_images] == [png(1), png(0)]
    missing = {**files, "json": json.dumps({**content, "images": ["c.png"]}).encode()}
    with pytest.raises(RecordError, match=r"images: Expected names of files of the sample, a.png, b.png, got 'c.png'"):
        only(tar(tmp_path / "b.tar", [missing]))
    with pytest.raises(RecordError, match="files of unknown types: mp4"):
        only(tar(tmp_path / "c.tar", [{**files, "mp4": b""}]))


def test_data_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "none.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"none\.tar is not an uncompressed tar file"):
        open_source(tmp_path / "none.tar")
    with pytest.raises(ValueError, match="must be a JSON Lines file, got .*nothing, which is not a file"):
        open_source(tmp_path / "nothing")
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"must have files of one kind, got \.parquet, \.tar"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="must be a Dataset unless it is streamed, got an IterableDataset"):
        open_source(IterableDataset.from_generator(lambda: iter([{}])))
    data = Dataset.from_list([{"messages": [QUESTION, ANSWER]}])
    with pytest.raises(ValueError, match="must be a Dataset without a transform"):
        open_source(data.with_transform(lambda row: row))
    DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="has the splits train; expected the folder of one"):
        open_source(tmp_path / "splits")


def test_another_file_of_the_same_name_is_another_source(tmp_path: Path) -> None:
    def source(*answers: str) -> Source:
        records = [{"messages": [QUESTION, {"role": "assistant", "content": one}]} for one in answers]
        return open_source(write_records(tmp_path / "a.jsonl", records))

    first, second = source("a"), source("bb", "c")
    assert first.identity != second.identity
    assert len(second) == 2
    assert [line.record.messages[1].content[0].text for line in second.lines()] == ["bb", "c"]
