"""Samples of a file, and their way into rows and batches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import picture
from tests.training.making import example, processor_for, write_records
from vlparts.parts.utils import IGNORE_INDEX
from vlparts.training.dataset import (
    PackSampler,
    PaddedCollator,
    PaddingFreeCollator,
    SampleDataset,
    collate_packed,
)
from vlparts.training.encoding import Sample, SampleEncoder
from vlparts.training.records import RecordError
from vlparts.training.skipped import SkippedRecords
from vlparts.training.sources import Source, open_source

PROCESSOR = processor_for()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Every third record has no image; lines 3 and 6 cannot be encoded."""
    rows = [example(index, None if index % 3 == 1 else tmp_path) for index in range(8)]
    rows[2] = {**rows[2], "image": "nothing.png"}
    rows[5]["messages"][1]["content"][1]["box"] = [0, 0, 99, 7]
    return open_source(write_records(tmp_path / "train.jsonl", rows))


def dataset(source: Source, **options: Any) -> SampleDataset:
    encoder = SampleEncoder(PROCESSOR, source.records.root)
    return SampleDataset(source, encoder, **{"progress": False, "on_error": "skip", **options})


def equal(first: Sample, second: Sample) -> bool:
    return (
        torch.equal(first.input_ids, second.input_ids)
        and torch.equal(first.labels, second.labels)
        and set(first.images) == set(second.images)
        and all(torch.equal(first.images[name], second.images[name]) for name in first.images)
    )


def test_a_record_that_cannot_be_encoded_is_an_error_with_its_line(source: Source) -> None:
    with pytest.raises(RecordError, match=r"train\.jsonl, line 3: Image .*nothing\.png does not exist\."):
        dataset(source, on_error="raise")


def test_skipped_records_are_kept_with_their_reasons(source: Source) -> None:
    found = dataset(source)
    assert [found.line(index).number for index in range(len(found))] == [1, 2, 4, 5, 7, 8]
    assert len(found) == 6
    first, second = found.skipped
    assert "train.jsonl, line 3: Image" in first
    assert "train.jsonl, line 6: `regions[0]`" in second


def test_no_usable_record_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    rows = [{**example(0, tmp_path), "image": "nothing.png"}] * 2
    source = open_source(write_records(tmp_path / "train.jsonl", rows))
    with pytest.raises(RecordError, match=r"got none \(2 skipped\)\. First skipped: .*line 1: Image .*nothing\.png"):
        dataset(source)


def damage(image: Path) -> None:
    """Cut the pixels off a file with a whole header."""
    image.write_bytes(image.read_bytes()[:60])


def good(folder: Path) -> Source:
    return open_source(write_records(folder / "good.jsonl", [example(index, folder) for index in range(4)]))


def test_damaged_pixels_are_found_when_they_are_used_or_if_asked_before(tmp_path: Path) -> None:
    source = good(tmp_path)
    damage(tmp_path / "2.png")
    found = dataset(source, on_error="raise")
    assert len(found) == 4
    with pytest.raises(RecordError, match=r"good\.jsonl, line 3: Image .*2\.png cannot be read"):
        found[[0, 2]]
    with pytest.raises(RecordError, match=r"good\.jsonl, line 3: Image .*2\.png cannot be read"):
        dataset(source, on_error="raise", check_pixels=True)
    checked = dataset(source, check_pixels=True)
    assert len(checked) == 3
    assert len(checked.skipped) == 1


def test_damaged_samples_are_left_out_of_their_packs_and_named_once(tmp_path: Path) -> None:
    source = good(tmp_path)
    damage(tmp_path / "2.png")
    left_out = SkippedRecords(tmp_path / "output" / "skipped.jsonl")
    found = dataset(source, left_out=left_out)
    assert not left_out.path.exists()
    for _ in range(2):
        pack = found[[0, 2, 3]]
        assert [len(one) for one in pack] == [found.lengths[0], found.lengths[3]]
    (message,) = left_out.messages()
    assert "good.jsonl, line 3: Image" in message
    (only,) = found[[2]]  # a pack must not be empty
    assert equal(only, found[[3]][0])
    for index in (0, 1, 3):
        damage(tmp_path / f"{index}.png")
    with pytest.raises(RecordError, match=r"good\.jsonl: no record can be encoded"):
        found[[0]]
    assert len(left_out.messages()) == 4


def test_an_image_of_another_size_than_measured_is_an_error_with_its_line(tmp_path: Path) -> None:
    source = good(tmp_path)
    found = dataset(source, on_error="raise")
    picture(24, 16).save(tmp_path / "1.png")
    with pytest.raises(RecordError, match=r"line 2: The sample has \d+ tokens, but \d+ when it was measured\."):
        found[[1]]


def test_an_image_that_vanishes_later_is_an_error_with_its_line(tmp_path: Path) -> None:
    found = dataset(good(tmp_path), on_error="raise")
    (tmp_path / "3.png").unlink()
    with pytest.raises(RecordError, match=r"good\.jsonl, line 4: Image .*3\.png does not exist\."):
        found[[0, 3]]


@pytest.mark.parametrize("cache", [False, True])
def test_packs_hold_their_samples(source: Source, cache: bool) -> None:
    found = dataset(source, cache=cache)
    encoder = SampleEncoder(PROCESSOR, source.records.root)
    pack = found[[4, 0, 1]]
    assert all(equal(sample, encoder(found.line(index).record)) for sample, index in zip(pack, [4, 0, 1], strict=True))
    assert [len(sample) for sample in pack] == [found.lengths[index] for index in (4, 0, 1)]


def test_targets_are_the_tokens_that_the_loss_counts(source: Source) -> None:
    found = dataset(source)
    batch = collate_packed([found[range(len(found))]])
    assert found.targets == int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def test_collating_leaves_cached_samples_alone(source: Source) -> None:
    found = dataset(source, cache=True)
    sample = found[[0]][0]
    sample.labels[0] = 5  # a label with loss where collating ignores it
    for pack in ([0], [0, 1], [1, 0]):
        collate_packed([found[pack]])
    assert sample.labels[0] == 5


def sample_of(length: int, start: int, grids: list[tuple[int, int]], in_loss: int = 2) -> Sample:
    ids = torch.arange(start, start + length)
    labels = torch.where(torch.arange(length) >= length - in_loss, ids, IGNORE_INDEX)
    rows = sum(height * width for height, width in grids)
    images = {
        "pixel_values": torch.full((rows, 3), float(start)),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
    }
    return Sample(ids, labels, images if grids else {})


SAMPLES = [
    sample_of(5, 10, [(2, 1)]),
    sample_of(1, 20, [], in_loss=1),
    sample_of(3, 30, [], in_loss=3),
    sample_of(7, 40, [(1, 1), (3, 1)]),
]


def test_a_row_of_samples() -> None:
    row = collate_packed([SAMPLES[:2], SAMPLES[2:]])
    assert row["input_ids"].tolist() == [[*range(10, 15), 20, *range(30, 33), *range(40, 47)]]
    assert row["position_ids"].tolist() == [[*range(5), 0, *range(3), *range(7)]]
    x = IGNORE_INDEX
    assert row["labels"].tolist() == [[x, x, x, 13, 14, x, x, 31, 32, x, x, x, x, x, 45, 46]]
    assert row["cu_seq_lens_q"].tolist() == [0, 5, 6, 9, 16]
    assert row["cu_seq_lens_q"].dtype == torch.int32
    assert row["cu_seq_lens_k"] is row["cu_seq_lens_q"]  # by which attention takes the segments as equal
    assert all(row[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids"))
    assert row["max_length_q"] == row["max_length_k"] == 7
    assert type(row["max_length_q"]) is int
    assert row["image_grid_thw"].tolist() == [[1, 2, 1], [1, 1, 1], [1, 3, 1]]
    assert row["pixel_values"][:, 0].tolist() == [10, 10, 40, 40, 40, 40]
    assert "attention_mask" not in row


def test_a_batch_of_samples() -> None:
    batch = PaddedCollator(pad_token_id=99)([SAMPLES])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (4, 7)
    assert batch["attention_mask"].sum(1).tolist() == [5, 1, 3, 7]
    for row, sample in enumerate(SAMPLES):
        length = len(sample)
        assert batch["input_ids"][row].tolist() == sample.input_ids.tolist() + [99] * (7 - length)
        assert batch["labels"][row].tolist() == sample.labels.tolist() + [IGNORE_INDEX] * (7 - length)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (7 - length)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 1], [1, 1, 1], [1, 3, 1]]
    assert batch["pixel_values"][:, 0].tolist() == [10, 10, 40, 40, 40, 40]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_becomes_the_row_of_its_samples(side: str) -> None:
    def collate(batch: list[list[Sample]]) -> dict[str, Any]:
        padded = PaddedCollator(pad_token_id=0)(batch)
        if side == "left":
            width = padded["input_ids"].shape[1]
            for name in ("input_ids", "labels", "attention_mask"):
                rows = zip(padded[name], SAMPLES, strict=True)
                padded[name] = torch.stack([row.roll(width - len(sample)) for row, sample in rows])
        return padded

    row, wanted = PaddingFreeCollator(collate)([SAMPLES]), collate_packed([SAMPLES])
    assert row.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(torch.as_tensor(row[name]), torch.as_tensor(value)), name


def test_other_inputs_per_token_raise() -> None:
    def collate(batch: list[list[Sample]]) -> dict[str, Any]:
        padded = PaddedCollator(pad_token_id=0)(batch)
        return {**padded, "mm_token_type_ids": padded["input_ids"]}

    with pytest.raises(ValueError, match="`collator` must return no 'mm_token_type_ids'"):
        PaddingFreeCollator(collate)([[sample_of(5, 10, [])]])


@pytest.mark.parametrize("collate", [collate_packed, PaddedCollator(0)])
def test_text_alone_has_no_image_tensors(collate: Any) -> None:
    batch = collate([SAMPLES[1:3]])
    assert not {"pixel_values", "image_grid_thw"} & set(batch)


@pytest.mark.parametrize("vision", ["navit", "clip", "siglip2"])
def test_image_tensors_of_every_vision_encoder_are_those_of_one_call(tmp_path: Path, vision: str) -> None:
    processor = processor_for(vision)
    rows = [example(index, tmp_path) for index in range(3)]
    source = open_source(write_records(tmp_path / "train.jsonl", rows))
    found = SampleDataset(source, SampleEncoder(processor, tmp_path), progress=False)
    batch = collate_packed([found[range(3)]])
    images = [picture(12 + 4 * (index % 4), 8 + 4 * (index % 3), seed=index) for index in range(3)]
    for name, value in processor.image_processor(images, return_tensors="pt").items():
        assert torch.equal(batch[name], value), name


def test_samples_of_a_file_fit_the_plan(source: Source) -> None:
    found = dataset(source)
    sampler = PackSampler(found.lengths, capacity=max(found.lengths) * 2, seed=3)
    rows = [collate_packed([found[pack]]) for pack in sampler]
    assert sum(row["input_ids"].shape[1] for row in rows) == sum(found.lengths)
    assert max(row["input_ids"].shape[1] for row in rows) <= max(found.lengths) * 2
