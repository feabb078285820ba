"""Records in the shapes of OpenAI, ShareGPT and LLaVA are those of ours, or errors that name what is wrong."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import picture
from tests.training.making import processor_for, save, write_records
from vlparts.training.config import TrainConfig
from vlparts.training.encoding import SampleEncoder
from vlparts.training.records import Record, RecordError, read_records

OURS = {
    "images": ["a.png", "b.png"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, "\nand ", {"type": "image"}, " differ?"]},
        {"role": "assistant", "content": "Yes."},
    ],
}
ONE = {
    "image": "a.png",
    "messages": [
        {"role": "user", "content": [{"type": "image"}, "\nWhat is it?"]},
        {"role": "assistant", "content": "A cat."},
    ],
}


def part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def openai(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Yes."}],
        **fields,
    }


def turns(*values: str, **fields: Any) -> dict[str, Any]:
    senders = ("human", "gpt")
    return {
        "conversations": [{"from": senders[i % 2], "value": value} for i, value in enumerate(values)],
        **fields,
    }


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "OpenAI": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        part({"url": "a.png"}),
                        {"type": "text", "text": "\nand "},
                        part("b.png"),
                        {"type": "text", "text": " differ?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            ]
        },
        OURS,
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "<image>\nand <image> differ?"},
                {"from": "gpt", "value": "Yes."},
            ],
            "images": ["a.png", "b.png"],
        },
        OURS,
    ),
    "ShareGPT with a system field": (
        turns("<image>\nand <image> differ?", "Yes.", system="Be brief.", images=["a.png", "b.png"]),
        OURS,
    ),
    "LLaVA": (turns("<image>\nWhat is it?", "A cat.", id="000", image="a.png"), ONE),
    "LLaVA with a list": (
        turns("<image>\nWhat is it?", "A cat.", id=7, image=["a.png"]),
        {"images": ["a.png"], "messages": ONE["messages"]},
    ),
    "LLaVA without a mark": (
        turns("What is it?", "A cat.", image="a.png"),
        {
            "image": "a.png",
            "messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}],
        },
    ),
    "text alone": (
        turns("Hi", "Hello."),
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_is_one_of_ours(tmp_path: Path, name: str) -> None:
    given, wanted = SHAPES[name]
    (line,) = read_records(write_records(tmp_path / "train.jsonl", [given])).lines
    assert line.record == Record.model_validate(wanted)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "two shapes": (turns("a", "b", messages=[]), "A record must have either 'messages' or 'conversations', got both."),
    "unknown key": (
        turns("a", "b", tools="[]", score=1),
        "with 'conversations': Expected the keys .*; unknown: 'tools', 'score'.",
    ),
    "a video": (turns("<video>", "b", video="a.mp4"), "unknown: 'video'."),
    "unknown key in a turn": (
        {"conversations": [{"from": "human", "value": "a", "weight": 0}]},
        "conversations.0: Expected the keys 'from', 'value'; unknown: 'weight'.",
    ),
    "no value": ({"conversations": [{"from": "human"}]}, "conversations.0: .*; missing: 'value'."),
    "unknown sender": (
        {"conversations": [{"from": "tool", "value": "a"}]},
        "conversations.0.from: Expected one of human",
    ),
    "a number as value": (
        {"conversations": [{"from": "gpt", "value": 1}]},
        "conversations.0.value: Expected a string, got int",
    ),
    "a turn that is no object": ({"conversations": ["a"]}, "conversations.0: Expected an object, got str"),
    "no list": ({"conversations": "a"}, "'conversations' must be a list, got str"),
    "two system turns": (
        {"conversations": [{"from": "system", "value": "a"}], "system": "b"},
        "conversations.0.from: A system turn must be the first and only one",
    ),
    "more marks than images": (turns("<image><image>", "b", image="a.png"), "2 image blocks for 1 images"),
    "a mark without an image": (turns("<image>", "b"), "1 image blocks for 0 images"),
    "image and images": (turns("a", "b", image=["a.png"], images=["b.png"]), "either 'image' or 'images', got both"),
    "URL": (
        openai(part({"url": "https://example.com/a.png"})),
        "Image https://example.com/a.png is neither a local file",
    ),
    "URL in LLaVA's": (turns("a", "b", image="http://example.com/a.png"), "is neither a local file nor a data: URI"),
    "URL in ours": ({**ONE, "image": "s3://bucket/a.png"}, "s3://bucket/a.png is neither a local file"),
    "file on a host": (openai(part("file://host/a.png")), "Image file://host/a.png is neither a local file"),
    "detail": (
        openai(part({"url": "a.png", "detail": "low"})),
        "messages.0.content.0.image_url: .*; unknown: 'detail'.",
    ),
    "no url": (openai(part({})), "messages.0.content.0.image_url: Expected the keys 'url'; missing: 'url'."),
    "a number as url": (openai(part(3)), "messages.0.content.0.image_url: Expected a URL, got int"),
    "further key in a part": (openai({**part("a.png"), "cache": 1}), "messages.0.content.0: .*; unknown: 'cache'."),
    "two places": (openai(part("a.png"), image="b.png"), "either parts of type 'image_url' or 'image', got both"),
    "weight of a message": (
        {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
        "messages.0.weight: Extra inputs are not permitted",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_ambiguous_or_unknown_is_named(tmp_path: Path, name: str) -> None:
    given, message = BROKEN[name]
    with pytest.raises(RecordError, match=f"line 1: .*{message}"):
        read_records(write_records(tmp_path / "train.jsonl", [given]))


def encoded(folder: Path, record: dict[str, Any], processor: Any) -> Any:
    (line,) = read_records(write_records(folder / "train.jsonl", [record])).lines
    return SampleEncoder(processor, folder)(line.record)


@pytest.mark.parametrize("kind", ["relative", "absolute", "file", "data"])
def test_images_from_files_and_uris_are_the_same(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    save(folder, "a.png", picture(20, 12))
    processor = processor_for()
    url = {
        "relative": "a.png",
        "absolute": str(folder / "a.png"),
        "file": (folder / "a.png").as_uri(),
        "data": "data:image/png;base64," + base64.b64encode((folder / "a.png").read_bytes()).decode(),
    }[kind]
    wanted = encoded(folder, ONE, processor)
    asked = [part({"url": url}), {"type": "text", "text": "\nWhat is it?"}]
    found = encoded(folder, {"messages": [{"role": "user", "content": asked}, ONE["messages"][1]]}, processor)
    assert found.input_ids.equal(wanted.input_ids)
    assert found.labels.equal(wanted.labels)
    assert all(torch.equal(found.images[name], value) for name, value in wanted.images.items())


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png;base64,####", "Image data:image/png;base64,####... is not a base64 data: URI"),
        ("data:image/svg+xml,<svg/>", "is not a base64 data: URI: expected ';base64,' after the type"),
        (
            "data:image/png;base64," + base64.b64encode(b"no image" * 50).decode(),
            "Image data:image/png;base64,bm8gaW1h... cannot be read",
        ),
    ],
)
def test_invalid_data_uris_are_named_by_their_start(tmp_path: Path, uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        encoded(tmp_path, {**ONE, "image": uri}, processor_for())
    assert len(str(caught.value)) < 200


def test_a_weight_is_read_beside_every_shape(tmp_path: Path) -> None:
    rows = [{**given, "importance": 2} for given, _ in SHAPES.values()]
    lines = read_records(write_records(tmp_path / "train.jsonl", rows), sample_weight_field="importance").lines
    assert [line.weight for line in lines] == [2.0] * len(SHAPES)
    for name in ("conversations", "system", "id", "messages"):
        with pytest.raises(ValueError, match="must not be a field that records have already"):
            TrainConfig(data="a", output="b", sample_weight_field=name)


def test_shapes_may_be_mixed_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(given) + "\n" for given, _ in SHAPES.values()), encoding="utf-8")
    assert len(read_records(path).lines) == len(SHAPES)
