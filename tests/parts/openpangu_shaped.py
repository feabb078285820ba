"""A small composed model of openPangu-VL's shape, its processor, and conversations for it."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

import vlparts
from tests.tiny import SIZES, order_one, picture, text_config, tokenizer
from vlparts import PanguEmbeddedConfig, WindowFreeViTConfig, WindowFreeViTImageProcessor
from vlparts.parts.chat_templates import OPENPANGU_CHAT_TEMPLATE, OPENPANGU_VISION_TOKENS

TEMPLATE_TOKENS = ["<s>", "[unused9]", "[unused10]", *OPENPANGU_VISION_TOKENS.values()]
VISION = {"hidden_size": 32, "intermediate_size": 48}


def small_images() -> WindowFreeViTImageProcessor:
    """An image processor that makes few patches."""
    return WindowFreeViTImageProcessor(
        patch_size=8,
        merge_size=2,
        size={"shortest_edge": 256, "longest_edge": 2048},
        video_min_total_pixels=256,
        video_min_frame_pixels=256,
        video_max_frame_pixels=1024,
    )


def pangu_text(words: Any, preset: str = "tiny_mrope") -> PreTrainedConfig:
    """A small openPangu text model for a tokenizer."""
    ids = {name: getattr(words, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}
    return PanguEmbeddedConfig.from_preset(preset, vocab_size=len(words), **ids, **sizes)


def openpangu(
    text: str = "pangu", vision: PreTrainedConfig | None = None, **changes: Any
) -> tuple[vlparts.VisionLanguageForConditionalGeneration, vlparts.VisionLanguageProcessor]:
    """A model with weights of order one, and its processor.

    Args:
        text: "pangu" (three-axis positions) or a kind of `tests.tiny.TEXTS`.
        vision: The vision encoder; by default the small hybrid with two feature layers.
        **changes: Further arguments of `compose`.
    """
    words = tokenizer()
    words.add_special_tokens({"extra_special_tokens": TEMPLATE_TOKENS}, replace_extra_special_tokens=False)
    if vision is None:
        vision = WindowFreeViTConfig.from_preset("hybrid_tiny", **VISION)
        changes = {"projector": "multi_tap_merger", "projector_options": {"hidden_size": 40}, **changes}
    model = vlparts.compose(
        vision=vision, text=pangu_text(words) if text == "pangu" else text_config(text, words), **changes
    )
    images = small_images() if vision.model_type == WindowFreeViTConfig.model_type else None
    processor = vlparts.compose_processor(
        model, words, images, chat_template=OPENPANGU_CHAT_TEMPLATE, **OPENPANGU_VISION_TOKENS
    )
    return order_one(model).eval(), processor


def video(frames: int, width: int = 32, height: int = 16, seed: int = 0) -> list[Image.Image]:
    """Random frames of one size."""
    return [picture(width, height, seed + index) for index in range(frames)]


def user(*media: Any, question: str = "Where is the cat?") -> list[dict[str, Any]]:
    """A conversation with pictures, and videos as lists of pictures, before the question."""
    blocks = [{"type": kind, kind: one} for one in media for kind in ["video" if isinstance(one, list) else "image"]]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": question}]}]


def encode(processor: Any, chats: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
    """Prompts as one batch, padded on the left."""
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    return {name: torch.as_tensor(value) for name, value in inputs.items()}


CHATS = [
    user(picture(48, 40), video(2), picture(16, 33)),
    user(question="Why?"),
    user(video(3, 16, 32), picture(32, 16), question="And?"),
]
