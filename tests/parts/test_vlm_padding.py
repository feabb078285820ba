"""Batches: generation pads on the left, training on the right, whatever the tokenizer came with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

import vlparts
from tests.tiny import order_one, picture, text_config, tokenizer, vision_config

QUESTIONS = ["Where is the cat?", "Where?", "Is the cat here, or is it there?"]
SIZES = [(24, 12), (16, 16), (12, 28)]


def composed(vision: str) -> tuple[Any, Any]:
    words = tokenizer()
    words.padding_side = "right"
    model = vlparts.compose(vision=vision_config(vision), text=text_config("qwen3", words))
    processor = vlparts.compose_processor(model, words)
    model.generation_config.eos_token_id = None  # all answers are equally long
    return order_one(model).eval(), processor


def chats(*, answered: bool = False) -> list[list[dict[str, Any]]]:
    rows = [
        [{"role": "user", "content": [{"type": "image", "image": picture(*size)}, {"type": "text", "text": question}]}]
        for size, question in zip(SIZES, QUESTIONS, strict=True)
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "It is here."}]}
    return [[*row, answer] for row in rows] if answered else rows


@pytest.mark.parametrize("vision", ["navit", "clip", "siglip2"])
def test_a_pipeline_answers_a_batch_as_its_samples_alone(vision: str, tmp_path: Path) -> None:
    model, processor = composed(vision)
    processor.save_pretrained(tmp_path)
    loaded = vlparts.VisionLanguageProcessor.from_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    for one in (processor, loaded):
        ask = pipeline("image-text-to-text", model=model, processor=one)
        alone = [ask(text=[chat], **options)[0][0]["generated_text"] for chat in chats()]
        together = [row[0]["generated_text"] for row in ask(text=chats(), batch_size=3, **options)]
        assert together == alone
        assert len(set(alone)) > 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_padded_on_the_left_and_conversations_on_the_right(side: str) -> None:
    words = tokenizer()
    words.padding_side = side
    model = vlparts.compose(vision=vision_config("navit"), text=text_config("qwen3", words))
    processor = vlparts.compose_processor(model, words)

    def padded_side(rows: list[Any], **options: Any) -> str:
        padding = options.pop("padding", {})
        mask = processor.apply_chat_template(
            rows,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **padding},
            **options,
        )["attention_mask"]
        assert not mask.all()
        return "left" if mask[:, -1].all() else "right"

    assert padded_side(chats(), add_generation_prompt=True) == "left"
    assert padded_side(chats(answered=True), continue_final_message=True) == "left"
    assert padded_side(chats(answered=True)) == "right"
    for explicit in ("left", "right"):
        for padding in ({"padding_side": explicit}, {"text_kwargs": {"padding_side": explicit}}):
            assert padded_side(chats(), add_generation_prompt=True, padding=padding) == explicit
            assert padded_side(chats(answered=True), padding=padding) == explicit
    called = processor(text=QUESTIONS, padding=True, return_tensors="pt")["attention_mask"]
    assert called[:, -1].all()
    assert words.padding_side == "left"


@pytest.mark.parametrize("text", ["qwen3", "llama"])
def test_the_loss_of_a_batch_does_not_depend_on_the_side(text: str) -> None:
    words = tokenizer()
    model = vlparts.compose(vision=vision_config("navit"), text=text_config(text, words))
    processor = vlparts.compose_processor(model, words)
    order_one(model).eval()
    losses = []
    for side in ("left", "right"):
        inputs = processor.apply_chat_template(
            chats(answered=True),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": side},
        )
        labels = inputs["input_ids"].masked_fill(~inputs.pop("assistant_masks").bool(), -100)
        with torch.no_grad():
            losses.append(model(**inputs, labels=labels).loss)
    torch.testing.assert_close(*losses)
