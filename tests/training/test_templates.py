"""Records as plain text, and prompts for records without a text of the user."""

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.training.making import TOKENIZERS, processor_for, save, settings, write_records
from vlparts.training.encoding import SampleEncoder
from vlparts.training.records import PageRecord, Record
from vlparts.training.train import train

PROMPTS = [f"Describe it, version {index}." for index in range(5)]


def record(*turns: tuple[str, Any], **images: Any) -> Record:
    return Record(messages=tuple({"role": role, "content": content} for role, content in turns), **images)


CAPTION = (("user", []), ("assistant", "a cat"))


def text_of(encoder: SampleEncoder, given: Record | PageRecord, number: int = 0) -> tuple[str, str]:
    """The decoded sample, with one placeholder per image, and what of it is in the loss."""
    sample = encoder(given, number)
    tokenizer = encoder.processor.tokenizer
    image = encoder.processor.image_token_id
    runs = ((one, len([*run])) for one, run in groupby(sample.input_ids.tolist()))
    ids = [one for one, length in runs for _ in range(1 if one == image else length)]
    kept = sample.input_ids[sample.labels != -100]
    assert (sample.labels[sample.labels != -100] == kept).all()
    return tokenizer.decode(ids), tokenizer.decode(kept)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_continuation_is_the_contents_of_the_turns(tmp_path: Path, name: str) -> None:
    processor = processor_for("navit", TOKENIZERS[name]())
    save(tmp_path, "a.png")
    encoder = SampleEncoder(processor, tmp_path, template="continuation")
    end, start = processor.tokenizer.eos_token, "<s>" if name in ("metaspace", "metaspace without prefix") else ""
    whole, answer = text_of(encoder, record(*CAPTION, image="a.png"))
    assert whole.replace(" ", "") == f"{start}<image>acat{end}"
    assert answer.replace(" ", "") == f"acat{end}"
    asked = [("system", "user"), ("user", "Where is the cat?"), ("assistant", "here")]
    whole, answer = text_of(encoder, record(*asked, ("user", ""), ("assistant", "cat"), image="a.png"))
    assert whole.replace(" ", "") == f"{start}user\n<image>Whereisthecat?\nhere{end}cat{end}"
    assert answer.replace(" ", "") == f"here{end}cat{end}"


def test_a_continuation_has_the_placeholders_of_the_processor(tmp_path: Path) -> None:
    tokens = {"vision_start_token": "<it's>", "vision_end_token": '<"end">'}
    encoder = SampleEncoder(processor_for("navit", **tokens), tmp_path, template="continuation")
    save(tmp_path, "a.png")
    whole, _ = text_of(encoder, record(*CAPTION, images=["a.png", "a.png"]))
    assert whole == 2 * '<it\'s><image><"end">' + "a cat<|im_end|>"


def test_a_prompt_is_chosen_by_seed_and_line(tmp_path: Path) -> None:
    processor = processor_for("navit")
    save(tmp_path, "a.png")

    def chosen(seed: int) -> list[str]:
        encoder = SampleEncoder(processor, tmp_path, prompts=PROMPTS, seed=seed)
        return [text_of(encoder, record(*CAPTION, image="a.png"), number)[0] for number in range(40)]

    first, second = chosen(0), chosen(1)
    assert chosen(0) == first != second
    assert set(first) == set(second)
    assert len(set(first)) == len(PROMPTS)
    assert all(any(f"<image>\n{prompt}" in one for prompt in PROMPTS) for one in first)


@pytest.mark.parametrize(
    "given",
    [
        record(("user", "What?"), ("assistant", "a cat"), image="a.png"),
        record(("user", [{"label": "cat", "box": [0, 0, 4, 4]}]), ("assistant", "a cat"), image="a.png"),
        record(("user", [{"type": "image"}]), ("user", "What?"), ("assistant", "a cat"), image="a.png"),
        record(("assistant", "a cat")),
        PageRecord(page="a.png", markdown="a cat", prompt="<image>\nRead."),
    ],
)
def test_records_with_a_text_of_the_user_have_no_prompt(tmp_path: Path, given: Record | PageRecord) -> None:
    processor = processor_for("navit")
    save(tmp_path, "a.png")
    plain = SampleEncoder(processor, tmp_path)(given)
    assert (SampleEncoder(processor, tmp_path, prompts=PROMPTS)(given).input_ids == plain.input_ids).all()


@pytest.mark.parametrize(
    "given",
    [
        record(*CAPTION, image="a.png"),
        record(("user", " "), ("assistant", "a cat"), image="a.png"),
        record(("system", "Be brief."), ("user", [{"type": "image"}]), ("assistant", "a cat"), image="a.png"),
        PageRecord(page="a.png", markdown="a cat"),
    ],
)
def test_records_without_one_have_it_after_the_images(tmp_path: Path, given: Record | PageRecord) -> None:
    save(tmp_path, "a.png")
    encoder = SampleEncoder(processor_for("navit"), tmp_path, prompts=["Say."])
    whole, answer = text_of(encoder, given)
    assert "<image>\nSay." in whole.replace("<image>\n Say", "<image>\nSay")
    assert answer.startswith("a cat")


def test_an_unknown_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`template` must be 'chat' or 'continuation', got 'plain'"):
        SampleEncoder(processor_for("navit"), tmp_path, template="plain")


def test_training_keeps_the_chat_template(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "cat"}]}]
    write_records(tmp_path / "train.jsonl", rows)
    chat = train(settings(tmp_path, max_steps=1))
    plain = train(settings(tmp_path, max_steps=1, output=tmp_path / "plain", template="continuation"))
    assert chat.processor.chat_template == plain.processor.chat_template
    assert (tmp_path / "plain" / "chat_template.jinja").is_file()
