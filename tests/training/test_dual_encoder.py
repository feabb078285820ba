"""Training of a dual encoder on pairs of images and captions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoProcessor, VisionTextDualEncoderProcessor, set_seed

from tests.tiny import picture
from tests.training.making import TEXT, VISION, losses, save, settings, write_records
from vlparts import NaViTDualEncoder, NaViTModel
from vlparts.training.config import TrainConfig
from vlparts.training.dual_encoder import PairCollator, PairEncoder, build_dual_encoder
from vlparts.training.records import PageRecord, Record, RecordError, read_records
from vlparts.training.train import train


def pair(index: int, folder: Path, caption: str | None = None) -> dict[str, Any]:
    name = save(folder, f"{index}.png", picture(12 + 4 * (index % 3), 8 + 4 * (index % 2), seed=index))
    answer = {"role": "assistant", "content": caption or f"picture {index}"}
    return {"image": name, "messages": [{"role": "user", "content": "What is it?"}, answer]}


def config_for(folder: Path, **changes: Any) -> TrainConfig:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.jsonl").exists():
        write_records(folder / "train.jsonl", [pair(index, folder) for index in range(8)])
    options = {"projection_dim": 16, "loss": "sigmoid"}
    return settings(folder, kind="dual_encoder", **{"max_items": 4, "dual_encoder": options, **changes})


def test_it_learns_and_is_saved(tmp_path: Path) -> None:
    result = train(config_for(tmp_path, max_steps=12, learning_rate=3e-3))
    assert losses(result)[-1] < losses(result)[0]
    again = AutoModel.from_pretrained(tmp_path / "output")
    assert type(again) is NaViTDualEncoder
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert type(AutoProcessor.from_pretrained(tmp_path / "output")) is VisionTextDualEncoderProcessor


def test_the_first_loss_is_that_of_the_first_batch(tmp_path: Path) -> None:
    """Of all pairs of a batch, with padding and packs as the model alone computes it."""
    config = config_for(tmp_path, max_items=8, max_steps=1, seed=3)
    found = losses(train(config))[0]
    set_seed(3)
    records = read_records(tmp_path / "train.jsonl")
    texts = [
        text for line in records.lines for text in ("user\n", "What is it?", "assistant\n", caption_of(line.record))
    ]
    model, processor = build_dual_encoder(config, texts)
    captions = [caption_of(line.record) for line in records.lines]
    images = [picture(12 + 4 * (index % 3), 8 + 4 * (index % 2), seed=index) for index in range(8)]
    batch = processor(images=images, text=captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch, return_loss=True).loss
    assert abs(found - float(expected)) < 1e-4 * float(expected)


def caption_of(record: Any) -> str:
    return record.messages[-1].content[0].text


def test_the_vision_tower_is_one_for_composed_models(tmp_path: Path) -> None:
    """Without attention pooling, and with the patches of the tower that was trained."""
    result = train(config_for(tmp_path, max_steps=2))
    tower = AutoModel.from_pretrained(tmp_path / "output" / "vision").eval()
    assert type(tower) is NaViTModel
    assert tower.config.pooling == "none"
    inputs = result.processor.image_processor(picture(20, 12), return_tensors="pt")
    assert AutoProcessor.from_pretrained(tmp_path / "output").image_processor.patch_size == 4
    whole = result.model.vision_model.eval()
    with torch.no_grad():
        assert torch.equal(tower(**inputs).last_hidden_state, whole(**inputs).last_hidden_state)


def test_parts_of_it_can_be_trained(tmp_path: Path) -> None:
    config = config_for(tmp_path, train=["vision", "projector"], learning_rates={"projector": 1e-2}, max_steps=1)
    model, _ = build_dual_encoder(config, ["picture"])
    trained = {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad}
    assert trained == {"vision_model", "image_projection", "text_projection"}
    assert train(config).steps == 1


def test_padding_of_captions_does_not_matter(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    model, processor = build_dual_encoder(config, ["picture"])
    encoder = PairEncoder(processor, tmp_path, 1000)
    records = [Record.model_validate(pair(index, tmp_path, "cat" * (1 + 5 * index))) for index in range(3)]
    pairs = [encoder(one) for one in records]
    batch = PairCollator(0)([pairs])
    assert batch.pop("return_loss") is True
    with torch.no_grad():
        together = model.eval()(**batch)
        for index, one in enumerate(pairs):
            single = PairCollator(0)([[one]])
            del single["return_loss"]
            alone = model(**single)
            torch.testing.assert_close(alone.text_embeds[0], together.text_embeds[index], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(alone.image_embeds[0], together.image_embeds[index], atol=1e-5, rtol=1e-5)


def test_native_towers_and_folders(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig

    text = {
        **CLIPTextConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2).to_dict()
    }
    first = train(config_for(tmp_path, max_steps=1))
    vision = tmp_path / "tower"
    first.model.vision_model.save_pretrained(vision)
    first.processor.image_processor.save_pretrained(vision)
    second = train(config_for(tmp_path, max_steps=1, vision=str(vision), text=text, output=tmp_path / "second"))
    assert type(second.model.text_model).__name__ == "CLIPTextModel"
    write_records(tmp_path / "train.jsonl", [pair(0, tmp_path, "cat " * 80)])
    with pytest.raises(RecordError, match=r"line 1: The caption has \d+ tokens; the text tower takes 77"):
        train(config_for(tmp_path, vision=str(vision), text=text, output=tmp_path / "third"))


def captioned(content: Any, **image: str) -> dict[str, Any]:
    return {**image, "messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": content}]}


REFUSED: dict[str, tuple[Any, str]] = {
    "page": (PageRecord(page="0.png", markdown="a"), "A record of a page is no pair"),
    "no image": (captioned("a"), "one image and one text of the assistant, got 0 images and 1 texts"),
    "two texts": (captioned(["a", "b"], image="0.png"), "got 1 images and 2 texts in 2 blocks"),
    "box": (captioned({"box": [0, 0, 1, 1]}, image="0.png"), "got 1 images and 0 texts in 1 blocks"),
    "blank": (captioned(" ", image="0.png"), "got 1 images and 1 texts in 1 blocks"),
    "missing": (captioned("a", image="x.png"), "does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pair_is_refused(tmp_path: Path, name: str) -> None:
    given, message = REFUSED[name]
    pair(0, tmp_path)
    _, processor = build_dual_encoder(config_for(tmp_path / "config"), ["picture"])
    with pytest.raises(ValueError, match=message):
        PairEncoder(processor, tmp_path, 1000)(Record.model_validate(given) if isinstance(given, dict) else given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {**VISION, "pooling": "none"}}, "must pool"),
        ({"dual_encoder": {"width": 3}}, "`dual_encoder` must have options among chunk_size, .*, got width"),
        ({"dual_encoder": {"projection_dim": 0}}, "projection_dim"),
        ({"text": {**TEXT, "hidden_size": "wide"}}, "`text`: .*hidden_size"),
        ({"vision": "none"}, "`vision` must be one of"),
        ({"capacity": 3}, r"line 1: The pair has \d+ patches and tokens; expected at most 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config_for(tmp_path, **changes))
