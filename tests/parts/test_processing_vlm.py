"""The processor: placeholders, templates, and counts that do not match."""

import pytest
from jinja2 import TemplateError

import vlparts
from tests.tiny import navit_config, picture, text_config, tokenizer
from vlparts import NaViTImageProcessor, VisionLanguageProcessor


def processor(**changes: object) -> VisionLanguageProcessor:
    return VisionLanguageProcessor(NaViTImageProcessor(patch_size=4), tokenizer(), **changes)


def test_the_placeholder_is_repeated_for_each_feature() -> None:
    one = processor()
    inputs = one(images=[picture(24, 12), picture(16, 16)], text="<image> and <image>", return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 3, 6], [1, 4, 4]]
    assert (inputs["input_ids"] == one.image_token_id).sum() == 18 + 16
    assert one.tokenizer.decode(inputs["input_ids"][0]).startswith("<image>" * 18 + " and " + "<image>" * 16)


def test_merged_patches_need_fewer_placeholders() -> None:
    one = VisionLanguageProcessor(NaViTImageProcessor(patch_size=4, merge_size=2), tokenizer(), spatial_merge_size=2)
    inputs = one(images=[picture(24, 16)], text="<image>", return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert (inputs["input_ids"] == one.image_token_id).sum() == 6


def test_inference_servers_can_ask_for_counts() -> None:
    one = processor()
    counts = one._get_num_multimodal_tokens(image_sizes=[(40, 40), (64, 20)])
    assert counts["num_image_tokens"] == [100, 80]


def test_the_default_template_ends_turns_with_the_end_token() -> None:
    one = processor()
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    assert one.apply_chat_template(chat) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
    )
    assert one.apply_chat_template(chat[:2], add_generation_prompt=True).endswith("<|im_start|>assistant\n")


def test_another_placeholder_is_used_in_the_template_too() -> None:
    words = tokenizer()
    words.add_special_tokens({"extra_special_tokens": ["<|img|>"]}, replace_extra_special_tokens=False)
    one = processor_with(words, image_token="<|img|>")
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    assert "<|img|>" in one.apply_chat_template(chat)


def processor_with(words: object, **changes: object) -> VisionLanguageProcessor:
    return VisionLanguageProcessor(NaViTImageProcessor(patch_size=4), words, **changes)


def test_unknown_blocks_are_refused() -> None:
    with pytest.raises(TemplateError, match="must have the type image or text, got audio"):
        processor().apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=False)


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([picture(8, 8)], ["no place"], "0 <image> tokens and 1 images"),
        (None, ["<image>"], "1 <image> tokens in the text but no images"),
        ([picture(8, 8)], ["<image> <image>"], "2 <image> tokens and 1 images"),
        (
            [[picture(8, 8)], [picture(8, 8), picture(8, 8)]],
            ["<image> <image>", "<image>"],
            "Sample 0 has 2.*1 images",
        ),
        ([[picture(8, 8)], []], ["", "<image>"], "Sample 0 has 0.*1 images"),
    ],
)
def test_images_and_placeholders_must_match_sample_by_sample(images: object, text: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor()(images=images, text=text)


def test_truncation_inside_an_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="Mismatch in `image` token count between text and `input_ids`"):
        processor()(images=[picture(32, 32)], text=["<image> what?"], truncation=True, max_length=20)


def test_a_tokenizer_without_the_placeholder_is_refused() -> None:
    with pytest.raises(ValueError, match="`tokenizer` has no token '<nowhere>'"):
        processor(image_token="<nowhere>")


def test_a_square_processor_needs_the_number_of_tokens() -> None:
    one = VisionLanguageProcessor(NaViTImageProcessor(), tokenizer())
    with pytest.raises(ValueError, match="`image_seq_length` must be set for an image processor that returns neither"):
        one.count_image_tokens({"pixel_values": [0]}, 0)


def test_the_composed_processor_adds_the_placeholder_and_enlarges_the_vocabulary() -> None:
    words = tokenizer()
    model = vlparts.compose(vision=navit_config(), text=text_config("qwen3", words))
    before = len(words)
    one = vlparts.compose_processor(model, words, image_token="<picture>")
    assert len(words) == before + 1
    assert model.config.image_token_id == one.image_token_id == before
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == before + 1
    assert model.config.text_config.vocab_size == before + 1
    assert "<|im_start|>" in words.all_special_tokens
