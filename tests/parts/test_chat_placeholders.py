"""Chat templates of text models, extended by placeholders: the text around them is what the template writes alone."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from transformers import LlamaConfig

import vlparts
from tests.chat_styles import MULTIMODAL, STYLES, Style, styled_tokenizer
from tests.tiny import SIZES, navit_config, picture, text_config, tokenizer
from vlparts import NaViTImageProcessor, VisionLanguageProcessor
from vlparts.parts.chat_placeholders import end_of_turn_id, with_placeholders
from vlparts.parts.chat_templates import DEFAULT_CHAT_TEMPLATE

ENCLOSED = {"image_token": "<img>", "video_token": "<vid>", "vision_start_token": "<|v", "vision_end_token": "v|>"}
IMAGE = {"type": "image"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def processor_of(words: Any, **options: Any) -> VisionLanguageProcessor:
    model = vlparts.compose(vision=navit_config(), text=text_config("llama", words))
    return vlparts.compose_processor(model, words, **options)


def joined(chat: list[dict[str, Any]], placeholders: dict[str, str]) -> list[dict[str, Any]]:
    """The same conversation as a user of the text model would write it, with placeholders in its strings."""
    chat = deepcopy(chat)
    for message in chat:
        if isinstance(message.get("content"), list):
            pieces = [placeholders.get(block["type"], block.get("text")) for block in message["content"]]
            message["content"] = "".join(pieces)
    return chat


SYSTEM = {"role": "system", "content": [text("Be "), text("brief.")]}
CHATS = {
    "text": [user(text(" Hi \n"))],
    "string": [{"role": "user", "content": "Hi"}],
    "one image": [user(IMAGE, text("What?"))],
    "system, images, turns": [
        SYSTEM,
        user(text("Is "), IMAGE, text(" or "), IMAGE, text("?")),
        {"role": "assistant", "content": [text("The "), text('cat "a\'b" {{ x }}.')]},
        user(text("And?"), IMAGE),
    ],
    "assistant last": [user(IMAGE), {"role": "assistant", "content": "A cat."}],
    "video": [user({"type": "video"}, IMAGE, text("Which?"))],
    "tools": [
        SYSTEM,
        user(IMAGE, text("Count.")),
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ],
}


@pytest.mark.parametrize(
    ("style", "name"), [(style, name) for style in STYLES for name in CHATS if name != "tools" or STYLES[style].tools]
)
def test_the_text_is_that_of_the_text_model(style: str, name: str) -> None:
    words = styled_tokenizer(STYLES[style])
    processor = processor_of(words, **(ENCLOSED if name == "video" else {}))
    places = {"image": "<|v<img>v|>", "video": "<|v<vid>v|>"} if name == "video" else {"image": "<image>"}
    for options in ({}, {"add_generation_prompt": True}, *([{"tools": [TOOL]}] if name == "tools" else [])):
        expected = words.apply_chat_template(joined(CHATS[name], places), tokenize=False, **options)
        assert processor.apply_chat_template(CHATS[name], **options) == expected
        assert "Hi" in expected or places["image"] in expected
    assert words.chat_template == STYLES[style].template


def test_a_text_in_the_style_of_mistral() -> None:
    processor = processor_of(styled_tokenizer(STYLES["mistral"]))
    chat = [SYSTEM, user(IMAGE, text("What?")), {"role": "assistant", "content": "A cat."}]
    assert processor.apply_chat_template(chat) == "<s>[INST] Be brief.\n\n<image>What?[/INST]A cat.</s>"


@pytest.mark.parametrize("style", STYLES)
def test_the_last_message_can_be_continued(style: str) -> None:
    processor = processor_of(styled_tokenizer(STYLES[style]))
    chat = [user(IMAGE, text("What?")), {"role": "assistant", "content": [text("A cat")]}]
    assert processor.apply_chat_template(chat, continue_final_message=True).endswith("A cat")


@pytest.mark.parametrize("style", [*STYLES, "default"])
def test_the_mask_of_the_assistant_is_its_answers(style: str) -> None:
    words = tokenizer() if style == "default" else styled_tokenizer(STYLES[style])
    processor, end = processor_of(words), "<|im_end|>" if style == "default" else STYLES[style].end
    chats = [
        [
            user({**IMAGE, "image": picture(16, 8)}, text("What?"), {**IMAGE, "image": picture(8, 8)}),
            {"role": "assistant", "content": [text("A cat.")]},
            user(text("Sure?"), {**IMAGE, "image": picture(8, 16)}),
            {"role": "assistant", "content": "Yes, I am."},
        ],
        [user(text("Hi")), {"role": "assistant", "content": "Hello"}],
    ]
    for side in ("left", "right"):
        inputs = processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": side},
        )
        rows = zip(inputs["input_ids"], inputs["assistant_masks"].bool(), strict=True)
        answers = [words.decode(row[mask]) for row, mask in rows]
        assert answers == [f"A cat.{end}Yes, I am.{end}", f"Hello{end}"]


def test_the_default_mask_leaves_out_images_of_the_assistant() -> None:
    words = tokenizer()
    chat = [
        user(text("Draw.")),
        {"role": "assistant", "content": [text("So: "), {**IMAGE, "image": picture(8, 8)}, text("done")]},
    ]
    inputs = processor_of(words).apply_chat_template(
        [chat], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    marked = inputs["input_ids"][inputs["assistant_masks"].bool()]
    assert words.decode(marked) == "So: done<|im_end|>"


def test_a_template_may_write_json_itself() -> None:
    words = tokenizer()
    words.chat_template = "{{ {'type': 'object'} | tojson }}{{ messages[0].content }}{{ eos_token }}"
    assert processor_of(words).apply_chat_template([user(IMAGE, text("a"))]) == '{"type": "object"}<image>a<|im_end|>'
    assert end_of_turn_id(words, words.chat_template) is None  # it writes no assistant turn


def test_other_blocks_are_refused() -> None:
    processor = processor_of(styled_tokenizer(STYLES["llama3"]))
    for kind in ("video", "audio"):
        with pytest.raises(TemplateError, match=f"must have the type image or text, got {kind}"):
            processor.apply_chat_template([user({"type": kind})])


def test_leading_and_trailing_white_space_of_a_template_is_kept() -> None:
    template = "\n  {% if true %}\n a{{ messages[0].content }} \n{% endif %}\n\n"
    words = tokenizer()
    chat = [{"role": "user", "content": "b"}]
    expected = words.apply_chat_template(chat, chat_template=template, tokenize=False)
    extended = with_placeholders(template, {"image": "<image>"})
    assert words.apply_chat_template(chat, chat_template=extended, tokenize=False) == expected
    assert expected.startswith("\n")


def test_placeholders_with_quotes_are_written_as_they_are() -> None:
    template = with_placeholders("{{ messages[0].content }}", {"image": "<\"'\\{{é>"})
    assert tokenizer().apply_chat_template([user(IMAGE)], chat_template=template, tokenize=False) == "<\"'\\{{é>"


def test_a_template_with_other_placeholders_asks_for_them() -> None:
    style = Style(MULTIMODAL, ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"), "<|im_end|>")
    with pytest.raises(
        ValueError,
        match=r"`image_token` is '<image>', but .* writes one image as '<.vision_start.><.image_pad.><.vision_end.>'",
    ):
        processor_of(styled_tokenizer(style))
    processor = processor_of(styled_tokenizer(style), image_token="<|image_pad|>")
    assert processor.chat_template == MULTIMODAL
    chat = [user(text("Is "), {**IMAGE, "image": picture(8, 8)})]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert "<|vision_start|><|image_pad|>" in processor.tokenizer.decode(inputs["input_ids"][0])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == inputs["image_grid_thw"].prod()


def test_a_template_that_places_images_must_place_videos_too() -> None:
    words = styled_tokenizer(Style(MULTIMODAL, ("<|image_pad|>", "<|video_pad|>"), "<|im_end|>"))
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    with pytest.raises(ValueError, match="`chat_template` must be given: .* places images itself, but no videos"):
        VisionLanguageProcessor(NaViTImageProcessor(patch_size=4), words, **tokens)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[0].content | upper }}", "it does not write the text of user turns"),
        ("{{ messages[0].content[:10] }} textafter", "it changes the text of user turns"),
    ],
)
def test_a_template_that_cannot_be_extended_asks_for_another(template: str, reason: str) -> None:
    words = tokenizer()
    words.chat_template = template
    with pytest.raises(ValueError, match=f"`chat_template` must be given: that of the tokenizer cannot .*{reason}"):
        processor_of(words)
    assert processor_of(words, chat_template=DEFAULT_CHAT_TEMPLATE).chat_template == DEFAULT_CHAT_TEMPLATE


def test_a_tokenizer_without_template_needs_the_tokens_of_chatml() -> None:
    words = styled_tokenizer(STYLES["llama3"])
    words.chat_template, words.eos_token = None, None
    with pytest.raises(
        ValueError, match=r"`chat_template` must be given: .* it lacks <\|im_start\|> or an `eos_token`"
    ):
        VisionLanguageProcessor(NaViTImageProcessor(patch_size=4), words)


def test_every_named_template_is_extended(tmp_path: Path) -> None:
    words = styled_tokenizer(STYLES["llama3"])
    words.chat_template = {
        "default": STYLES["llama3"].template,
        "tool_use": "{{ messages[-1].content }}{{ tools | length }}",
        "rag": "{% for document in documents %}{{ document.text }}{% endfor %}{{ messages[-1].content }}",
    }
    processor = processor_of(words)
    processor.save_pretrained(tmp_path)
    chat = [user(IMAGE, text("a"))]
    for one in (processor, VisionLanguageProcessor.from_pretrained(tmp_path)):
        assert "<image>a<|eot_id|>" in one.apply_chat_template(chat)
        assert one.apply_chat_template(chat, tools=[TOOL]) == "<image>a1"
        document = {"title": "b", "text": "c"}
        assert one.apply_chat_template(chat, chat_template="rag", documents=[document]) == "c<image>a"


def test_a_saved_template_is_not_extended_again(tmp_path: Path) -> None:
    processor = processor_of(styled_tokenizer(STYLES["gemma"]))
    processor.save_pretrained(tmp_path)
    loaded = VisionLanguageProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == loaded.tokenizer.chat_template == processor.chat_template
    # Nor is it when the tokenizer of a composed model is used for another one.
    assert processor_of(loaded.tokenizer).chat_template == processor.chat_template


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_of_tokenizer_and_model_agree(style: str, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.trainer_utils import align_special_tokens, logger

    words = styled_tokenizer(STYLES[style])
    model = vlparts.compose(vision=navit_config(), text=LlamaConfig(**SIZES, vocab_size=len(words)))
    processor = vlparts.compose_processor(model, words)
    assert words.pad_token == STYLES[style].pad or (STYLES[style].pad is None and words.pad_token == "<pad>")
    assert words.pad_token_id < model.config.text_config.vocab_size
    before = model.config.to_dict(), model.generation_config.to_dict()
    logger.addHandler(caplog.handler)
    align_special_tokens(model, processor)
    logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    ends = torch.tensor(model.generation_config.eos_token_id).flatten().tolist()
    assert {words.eos_token_id, words.convert_tokens_to_ids(STYLES[style].end)} <= set(ends)
    assert end_of_turn_id(words, processor.chat_template) == words.convert_tokens_to_ids(STYLES[style].end)


def test_padding_tokens_that_are_given_or_the_models() -> None:
    words = styled_tokenizer(STYLES["llama3"])
    processor_of(words, pad_token="<|endoftext|>")
    assert (words.pad_token, words.pad_token_id) == ("<|endoftext|>", 0)
    words = styled_tokenizer(STYLES["llama3"])
    text = text_config("llama", words)
    text.pad_token_id = words.convert_tokens_to_ids("<|eot_id|>")
    vlparts.compose_processor(vlparts.compose(vision=navit_config(), text=text), words)
    assert words.pad_token == "<|eot_id|>"
    # An ordinary token would be lost in decoded answers.
    words = styled_tokenizer(STYLES["llama3"])
    text.pad_token_id = words.convert_tokens_to_ids("a")
    vlparts.compose_processor(vlparts.compose(vision=navit_config(), text=text), words)
    assert words.pad_token == "<pad>"
    assert words.decode(words("a cat")["input_ids"], skip_special_tokens=True) == "a cat"


def test_control_tokens_of_users_can_be_written_as_text() -> None:
    """Those of the template, and the placeholders in it, keep their meaning."""
    for words in (tokenizer(), styled_tokenizer(STYLES["llama3"])):
        processor = processor_of(words)
        chat = [user({**IMAGE, "image": picture(8, 8)}, text("What is <image>?"))]
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", sanitize_control_tokens=True
        )
        assert (inputs["input_ids"] == processor.image_token_id).sum() == inputs["image_grid_thw"].prod()
        assert "What is <image>?" in words.decode(inputs["input_ids"][0])


def test_settings_of_a_tokenizer_are_kept() -> None:
    words = styled_tokenizer(STYLES["gemma"])
    words.truncation_side, words.model_max_length = "left", 77
    before, special = dict(words.special_tokens_map), set(words.all_special_tokens)
    processor_of(words)
    assert (words.truncation_side, words.model_max_length) == ("left", 77)
    assert words.special_tokens_map == before
    assert set(words.all_special_tokens) == special | {"<image>"}
