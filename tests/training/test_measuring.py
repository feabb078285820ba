"""Lengths without pixels are those of encoded samples, and are read once."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.test_image_processors import KINDS, pairs
from tests.tiny import picture, text_config, tokenizer
from tests.training.making import TOKENIZERS, example, processor_for, write_records
from vlparts import compose, compose_processor
from vlparts.parts.image_processing_deepencoder import DeepEncoderImageProcessor
from vlparts.parts.utils import IGNORE_INDEX
from vlparts.training.chat_tokens import ChatTokenizer
from vlparts.training.encoding import Measured, Sample, SampleEncoder
from vlparts.training.measuring import measure_samples
from vlparts.training.record_images import ImageBytes
from vlparts.training.records import Record, RecordError
from vlparts.training.sources import open_source

PROCESSORS: dict[str, Any] = {}


def processor(kind: str) -> Any:
    """The processor of a composed model with an encoder of a kind and the image processor of its folder."""
    if kind not in PROCESSORS:
        encoder, image_processor = pairs()[kind]
        made = compose_processor(compose(encoder, text_config("qwen3", words := tokenizer())), words)
        made.image_processor = image_processor
        PROCESSORS[kind] = made
    return PROCESSORS[kind]


def lengths(sample: Sample) -> tuple[int, int]:
    """Length and number of targets of an encoded sample."""
    return len(sample), int((sample.labels[1:] != IGNORE_INDEX).sum())


def about(answer: str, *images: Any) -> Record:
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": answer}]
    return Record.model_validate({"images": images, "messages": turns})


def assert_measured(encoder: SampleEncoder, record: Record) -> None:
    """The measured lengths, or the error, are those of encoding."""
    (found,) = encoder.measure([(record, 3)])
    if isinstance(found, Measured):
        assert (found.length, found.targets) == lengths(encoder(record, 3))
    else:
        with pytest.raises(ValueError, match=re.escape(str(found))):
            encoder(record, 3)


SIDE = st.integers(1, 90)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(sizes=st.lists(st.tuples(SIDE, SIDE), max_size=3), answer=st.text("cat here", min_size=1, max_size=9))
def test_measured_lengths_are_those_of_encoded_samples(kind: str, sizes: list[tuple[int, int]], answer: str) -> None:
    """For every image processor; where an image is too elongated for one, the errors are the same."""
    encoder = SampleEncoder(processor(kind), Path())
    assert_measured(encoder, about(answer, *(Image.new("RGB", size) for size in sizes)))


def straightforward(made: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Ids of a conversation with one answer: those of the prompt, and the rest."""

    def ids(text: str) -> list[int]:
        bos = made.tokenizer.bos_token
        return made.tokenizer(text, add_special_tokens=bos is None or not text.startswith(bos))["input_ids"]

    prompt = made.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = made.apply_chat_template(messages, tokenize=False)
    before = ids(prompt)
    if ids(whole)[: len(before)] == before:
        return ids(whole)
    return before + made.tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("words", TOKENIZERS)
@settings(max_examples=12)
@given(texts=st.lists(st.tuples(st.text(max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=4))
def test_ids_of_many_conversations_are_those_of_each(words: str, texts: list[tuple[str, str]]) -> None:
    made = PROCESSORS.setdefault(words, processor_for(words=TOKENIZERS[words]()))
    image = made.image_token
    chats = [
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.replace(image, "")}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer.replace(image, "")}]},
        ]
        for asked, answer in texts
    ]
    for chat, found in zip(chats, ChatTokenizer(made)(chats), strict=True):
        assert not isinstance(found, ValueError)
        assert found.ids == straightforward(made, chat)


@pytest.mark.parametrize("mode", ["tiny", "base", "gundam"])
def test_views_are_counted(mode: str) -> None:
    image_processor = DeepEncoderImageProcessor(mode=mode)
    made = processor_for()
    for size in [(100, 80), (1500, 700), (700, 2000), (640, 640), (641, 640)]:
        image = Image.new("RGB", size)
        inputs = image_processor(image, return_tensors="pt")
        made.image_processor, made.image_seq_length = image_processor, None
        assert made._get_num_multimodal_tokens([size[::-1]])["num_image_tokens"] == [
            made.count_image_tokens(inputs, 0)
        ]


def counting(encoder: SampleEncoder) -> tuple[SampleEncoder, list[int]]:
    """An encoder that notes how many records it measures."""
    calls: list[int] = []
    measure = encoder.measure
    encoder.measure = lambda records: calls.append(len(records)) or measure(records)  # type: ignore[method-assign]
    return encoder, calls


def test_a_second_start_measures_nothing(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", [example(index, tmp_path) for index in range(5)])
    made = processor_for()

    def start(**options: Any) -> tuple[list[int], int]:
        encoder, calls = counting(SampleEncoder(made, tmp_path, **options))
        found = measure_samples(open_source(path), encoder, progress=False)
        return found.lengths.tolist(), sum(calls)

    first, calls = start()
    assert calls == 5
    assert start() == (first, 0)
    assert start(max_length=1000) == (first, 0)
    assert start(template="continuation")[1] == 5
    made.image_processor.max_pixels = 32
    assert start()[1] == 5
    write_records(path, [example(index, tmp_path) for index in range(4)])
    assert start()[1] == 4


def test_several_processes_measure_the_same(tmp_path: Path) -> None:
    rows = [example(index, None if index % 3 == 1 else tmp_path) for index in range(9)]
    rows[4] = {"messages": []}
    (tmp_path / "0.png").unlink()
    path = write_records(tmp_path / "train.jsonl", rows)
    encoder = SampleEncoder(processor_for(), tmp_path)
    one = measure_samples(open_source(path), encoder, "skip", progress=False)
    encoder.seed = 1  # another key, so that nothing is found in the cache
    two = measure_samples(open_source(path), encoder, "skip", progress=False, num_proc=2)
    assert one.rows.tolist() == two.rows.tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert one.lengths.tolist() == two.lengths.tolist()
    assert one.skipped == two.skipped
    assert ["line 1: Image" in one.skipped[0], "line 5: messages" in one.skipped[1]] == [True, True]
    encoder.seed = 2
    for num_proc in (None, 2):
        with pytest.raises(RecordError, match=r"train\.jsonl, line [15]: "):
            measure_samples(open_source(path), encoder, progress=False, num_proc=num_proc)


def test_errors_of_a_cache_made_with_skip_are_raised(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", [example(0), {"messages": []}, example(1)])
    encoder = SampleEncoder(processor_for(), tmp_path)
    measure_samples(open_source(path), encoder, "skip", progress=False)
    with pytest.raises(RecordError, match=r"train\.jsonl, line 2: messages: "):
        measure_samples(open_source(path), encoder, progress=False)
    limited = SampleEncoder(encoder.processor, tmp_path, max_length=5)
    with pytest.raises(RecordError, match=r"line 1: The sample has \d+ tokens .* expected at most 5\. Raise"):
        measure_samples(open_source(path), limited, progress=False)


def test_no_pixels_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("png", "jpg", "webp"):
        picture(40, 24).save(tmp_path / f"a.{suffix}")
    content = (tmp_path / "a.png").read_bytes()
    records = [about("here", path) for path in ("a.png", "a.jpg", "a.webp", ImageBytes(content))]
    encoder = SampleEncoder(processor_for(), tmp_path)
    wanted = [lengths(encoder(record)) for record in records]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    found = encoder.measure([(record, 0) for record in records])
    assert [(one.length, one.targets) for one in found if isinstance(one, Measured)] == wanted
