"""The processor of POINTS1.5, and the whole model in use: prompts, batches, generation, pipeline, training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline

from tests.checkpoints.files import write_json
from tests.checkpoints.points15.files import points_folder
from tests.tiny import picture
from vlparts import WindowFreeViTConfig
from vlparts.checkpoints.points15 import model_from_points15, processor_from_points15, shrink_image, to_points15

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return points_folder(tmp_path_factory.mktemp("points") / "in", "custom_llama")


def turn(role: str, *content: Any) -> dict[str, Any]:
    """A turn of texts and images."""
    blocks = [
        {"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": one} for one in content
    ]
    return {"role": role, "content": blocks}


def test_the_published_prompt(folder: Path) -> None:
    processor = processor_from_points15(folder)
    chat = [turn("user", picture(9, 9), "What?", picture(8, 8)), turn("assistant", "A cat."), turn("user", "Where?")]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>user\n{IMAGE}What?{IMAGE}<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "system", "content": "Hi"}, "A role must be user or assistant, got system"),
        ({"role": "user", "content": [{"type": "audio"}]}, "the type image or text, got audio"),
        (
            {"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": 9}]},
            "must not have max_pixels; pass the image through shrink_image",
        ),
    ],
)
def test_turns_that_the_template_refuses(folder: Path, message: dict[str, Any], error: str) -> None:
    with pytest.raises(Exception, match=error):
        processor_from_points15(folder).apply_chat_template([message])


def test_sizes_are_those_of_the_published_code_or_of_the_file(tmp_path: Path) -> None:
    folder = points_folder(tmp_path / "in", "qwen2")
    images = processor_from_points15(folder).image_processor
    assert images.size == {"shortest_edge": 3136, "longest_edge": 1_003_520}
    assert images.get_grid_thw(10, 10) == (1, 4, 4)
    assert images.get_grid_thw(3000, 2000) == (1, 86, 58)
    assert processor_from_points15(folder, min_pixels=840**2).image_processor.get_grid_thw(280, 280) == (1, 60, 60)
    fields = {"patch_size": 14, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    write_json(folder / "preprocessor_config.json", {**fields, "min_pixels": 784, "max_pixels": 7840})
    images = processor_from_points15(folder, max_pixels=3136).image_processor
    assert images.size == {"shortest_edge": 784, "longest_edge": 3136}
    assert list(images.image_std) == [0.25] * 3
    model = model_from_points15(folder)
    assert model.config.vision_config.image_std == [0.25] * 3
    to_points15(model, tmp_path / "out", "qwen2")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (written["image_std"], written["min_pixels"], written["max_pixels"]) == ([0.25] * 3, 3136, 1_003_520)
    with pytest.raises(ValueError, match="`max_pixels` must be an integer of at least 1, got 0"):
        processor_from_points15(folder, max_pixels=0)


def test_shrunk_images_keep_their_aspect_ratio() -> None:
    image = picture(200, 100)
    assert shrink_image(image, 20_000).size == (200, 100)
    shrunk = shrink_image(image, 5_000)
    assert shrunk.size == (100, 50)
    assert shrunk.tobytes() == image.resize((100, 50)).tobytes()
    assert shrink_image(image, 19_999).size == (199, 99)
    with pytest.raises(ValueError, match="leave a pixel of each side of 200 x 100, got 1"):
        shrink_image(image, 1)
    with pytest.raises(ValueError, match="`max_pixels` must be an integer"):
        shrink_image(image, 0.5)  # type: ignore[arg-type]


def test_batches_generation_and_the_pipeline(folder: Path) -> None:
    model, processor = model_from_points15(folder, dtype=torch.float32), processor_from_points15(folder)
    chats = [[turn("user", picture(60, 90), picture(30, 30), "Compare.")], [turn("user", "Hi")]]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    both = processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **options)
    assert both["image_grid_thw"].tolist() == [[1, 6, 4], [1, 4, 4]]
    assert (both["input_ids"][0] == processor.image_token_id).sum() == 6 + 4
    answers = model.generate(**both, max_new_tokens=4, do_sample=False)[:, both["input_ids"].shape[1] :]
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    for chat, answer in zip(chats, answers, strict=True):
        alone = processor.apply_chat_template(chat, **options)
        expected = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, alone["input_ids"].shape[1] :]
        torch.testing.assert_close(answer[: len(expected)], expected)
        text = ask(text=chat, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
        assert text == processor.decode(expected, skip_special_tokens=True)


def test_a_step_of_the_trainer(folder: Path, tmp_path: Path) -> None:
    model, processor = model_from_points15(folder, dtype=torch.float32), processor_from_points15(folder)
    chat = [turn("user", picture(60, 90), "What?"), turn("assistant", "A cat.")]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    inputs = dict(processor.apply_chat_template(chat, **options))
    answer = torch.as_tensor(inputs.pop("assistant_masks")).bool()
    assert processor.decode(inputs["input_ids"][answer]) == "A cat.<|im_end|>"
    inputs["labels"] = inputs["input_ids"].masked_fill(~answer, -100)
    model.requires_grad_(False)
    model.model.projector.requires_grad_(True)
    before = {name: one.clone() for name, one in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model=model, args=arguments, train_dataset=[inputs], data_collator=lambda rows: rows[0]).train()
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert changed == {name for name in before if name.startswith("model.projector.")}
    assert isinstance(model.config.vision_config, WindowFreeViTConfig)
