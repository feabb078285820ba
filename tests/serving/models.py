"""Composed models that answer about colours: built, trained for a minute and saved with the answers of `generate`.

`python -m tests.serving.models FOLDER NAME...` writes a folder per composition. It holds the model, the processor, a
LoRA adapter in `adapter/`, the images of the requests in `inputs/`, and `expected.json`: for each request the
prompt and what `generate` answers in each dtype and with the adapter, see [`answer`].
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from tests.serving.conversations import COLOURS, IMAGES, NOTHING, QUESTION, VIDEOS, Request, random_request
from vlparts import (
    DeepEncoderConfig,
    DeepEncoderImageProcessor,
    MoGEConfig,
    NaViTConfig,
    NaViTImageProcessor,
    PanguEmbeddedConfig,
    WindowFreeViTConfig,
    WindowFreeViTImageProcessor,
    compose,
    compose_processor,
)
from vlparts.parts.chat_templates import (
    OPENPANGU_CHAT_TEMPLATE,
    OPENPANGU_VISION_TOKENS,
    POINTS_CHAT_TEMPLATE,
    POINTS_VISION_TOKENS,
)
from vlparts.training.tokenizer import train_tokenizer

VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {**VISION, "image_size": 32, "patch_size": 8}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "num_expert_groups": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
SMALLEST, LARGEST = 16 * 16, 80 * 80  # pixels
AREA = {"shortest_edge": SMALLEST, "longest_edge": LARGEST}
NEW_TOKENS = 12
TOP = 20  # tokens of each step whose log-probabilities are compared
STEPS = 160
# With adapters vLLM runs experts in Triton alone. Its class for models without experts leaves ours as they are.
WITHOUT_EXPERTS = {"hf_overrides": {"architectures": ["TransformersMultiModalForCausalLM"]}}
KINDS = ("float32", "bfloat16", "adapter")  # of answers: by the model in a dtype, or by the adapter in float32


@dataclass(frozen=True)
class Composition:
    """The parts of a model, and what differs from the defaults of `compose` and `compose_processor`."""

    vision: Callable[[], PreTrainedConfig]
    text: Callable[..., PreTrainedConfig]
    projector: str = "mlp2_gelu"
    text_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    image_processor: Callable[[], Any] | None = None
    processor_options: dict[str, Any] = field(default_factory=dict)
    adapter_options: dict[str, Any] = field(default_factory=dict)  # arguments of `vllm.LLM` to serve the adapter

    @property
    def videos(self) -> bool:
        return "video_token" in self.processor_options

    @property
    def requests(self) -> tuple[Request, ...]:
        return IMAGES + VIDEOS if self.videos else IMAGES


def _navit() -> NaViTConfig:
    return NaViTConfig(**VISION, patch_size=8, spatial_merge_size=2)


def _navit_processor() -> NaViTImageProcessor:
    return NaViTImageProcessor(patch_size=8, merge_size=2, size=AREA)


def _windowfree(preset: str, **changes: Any) -> Callable[[], WindowFreeViTConfig]:
    return lambda: WindowFreeViTConfig.from_preset(preset, **{**VISION, "patch_size": 8, **changes})


def _windowfree_processor() -> WindowFreeViTImageProcessor:
    limits = {"min_total": SMALLEST, "max_total": 4 * LARGEST, "min_frame": SMALLEST, "max_frame": LARGEST}
    video = {f"video_{name}_pixels": value for name, value in limits.items()}
    # A server gives each video a budget of pixels of its own.
    return WindowFreeViTImageProcessor(patch_size=8, size=AREA, video_shared_budget=False, **video)


def _deepencoder_processor() -> DeepEncoderImageProcessor:
    return DeepEncoderImageProcessor(base_size=128, tile_size=64, untiled_size=64, max_tiles=4)


MULTIMODAL_ROPE = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "mrope_section": [4, 6, 6],
    "mrope_interleaved": True,
}
COMPOSITIONS = {
    "navit_qwen3": Composition(_navit, Qwen3Config, image_processor=_navit_processor),
    "navit_moge": Composition(
        _navit,
        MoGEConfig,
        text_options=EXPERTS,
        image_processor=_navit_processor,
        adapter_options=WITHOUT_EXPERTS,
    ),
    "windowfree_llama": Composition(
        _windowfree("window_free_tiny"),
        LlamaConfig,
        projector="patch_merger",
        text_options={"tie_word_embeddings": True},
        image_processor=_windowfree_processor,
    ),
    "openpangu": Composition(
        _windowfree("hybrid_tiny", num_hidden_layers=4),
        PanguEmbeddedConfig,
        projector="multi_tap_merger",
        text_options={"rope_parameters": MULTIMODAL_ROPE},
        options={"projector_options": {"hidden_size": 96}},
        image_processor=_windowfree_processor,
        processor_options={"chat_template": OPENPANGU_CHAT_TEMPLATE, **OPENPANGU_VISION_TOKENS},
    ),
    "points": Composition(
        _windowfree("qwen2_vl_vit"),
        Qwen2Config,
        projector="points_merger",
        image_processor=_windowfree_processor,
        processor_options={"chat_template": POINTS_CHAT_TEMPLATE, **POINTS_VISION_TOKENS},
    ),
    "deepencoder_moge": Composition(
        lambda: DeepEncoderConfig.from_preset("deepencoder_tiny"),
        MoGEConfig,
        projector="deepseek_ocr",
        text_options=EXPERTS,
        image_processor=_deepencoder_processor,
        adapter_options=WITHOUT_EXPERTS,
    ),
    "navit_merged": Composition(
        _navit,
        Qwen3Config,
        options={"token_reduction": "merge_similar", "token_ratio": 0.5},
        image_processor=_navit_processor,
    ),
    "openpangu_pooled": Composition(
        _windowfree("window_free_tiny"),
        PanguEmbeddedConfig,
        projector="patch_merger",
        text_options={"rope_parameters": MULTIMODAL_ROPE},
        options={"token_reduction": "average_pool", "token_ratio": 0.25},
        image_processor=_windowfree_processor,
        processor_options={"chat_template": OPENPANGU_CHAT_TEMPLATE, **OPENPANGU_VISION_TOKENS},
    ),
    "deepencoder_pruned": Composition(
        lambda: DeepEncoderConfig.from_preset("deepencoder_tiny"),
        Qwen3Config,
        projector="deepseek_ocr",
        options={"token_reduction": "prune_diverse", "token_ratio": 0.5},
        image_processor=_deepencoder_processor,
    ),
    "pixtral_qwen3": Composition(
        lambda: PixtralVisionConfig(**VISION, image_size=96, patch_size=8),
        Qwen3Config,
        options={"spatial_merge_size": 2},
    ),
    "clip_llama": Composition(lambda: CLIPVisionConfig(**SQUARE), LlamaConfig),
    "siglip_gemma2": Composition(
        lambda: SiglipVisionConfig(**SQUARE),
        Gemma2Config,
        text_options={"query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 8.0},
    ),
    "siglip2_qwen3": Composition(lambda: Siglip2VisionConfig(**VISION, num_patches=64, patch_size=8), Qwen3Config),
    "dinov2_gemma3": Composition(
        lambda: Dinov2Config(**SQUARE),
        Gemma3TextConfig,
        text_options={"query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 8.0},
    ),
}


def build(composition: Composition) -> tuple[Any, Any]:
    """A new model and its processor."""
    torch.manual_seed(0)
    words = [*COLOURS, NOTHING, QUESTION, "user\n", "assistant\n", " ".join(COLOURS)]
    tokenizer = train_tokenizer(words * 4)
    if composition.videos:
        more = {"extra_special_tokens": ["<s>", "[unused9]", "[unused10]"]}
        tokenizer.add_special_tokens(more, replace_extra_special_tokens=False)
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    fields = {**TEXT, **special, "vocab_size": len(tokenizer), "rope_parameters": rope, **composition.text_options}
    if composition.text is Gemma3TextConfig:
        fields["rope_parameters"] = None  # it has one for each kind of layer
    text = composition.text(**fields)
    model = compose(composition.vision(), text, composition.projector, **composition.options)
    image_processor = None if composition.image_processor is None else composition.image_processor()
    return model, compose_processor(model, tokenizer, image_processor, **composition.processor_options)


def train(model: Any, processor: Any, steps: int, videos: bool, prefix: str = "", rate: float = 2e-3) -> None:
    """Train on random requests to answer with the prefix and the colours."""
    rng, tokenizer = random.Random(0), processor.tokenizer
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 20) * (1 - step / steps))
    model.train()
    for _ in range(steps):
        requests = [random_request(rng, videos) for _ in range(8)]
        prompts = [render(processor, request) for request in requests]
        answers = [prefix + request.answer + tokenizer.eos_token for request in requests]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        data = processor(text=texts, padding=True, padding_side="right", return_tensors="pt", **media(requests))
        data.pop("mm_token_type_ids", None)
        lengths = data["attention_mask"].sum(-1)
        answered = torch.tensor([len(tokenizer(answer)["input_ids"]) for answer in answers])
        places = torch.arange(data["input_ids"].shape[1])
        in_answer = (places >= (lengths - answered)[:, None]) & (places < lengths[:, None])
        loss = model(**data, labels=data["input_ids"].masked_fill(~in_answer, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def render(processor: Any, request: Request) -> str:
    return processor.apply_chat_template(request.conversation, add_generation_prompt=True)


def media(requests: list[Request]) -> dict[str, list]:
    """The images and videos of the requests, as arguments of a processor."""
    drawn = {
        "images": [request.draw_images() for request in requests],
        "videos": [request.draw_videos() for request in requests],
    }
    return {name: groups for name, groups in drawn.items() if any(groups)}


@torch.no_grad()
def answer(model: Any, processor: Any, request: Request) -> dict[str, Any]:
    """What `generate` answers to the request alone.

    Returns:
        `prompt_tokens`, their number; `tokens`; `logprobs`, for each of them the log-probabilities of the likeliest
        tokens; `text`.
    """
    inputs = processor(text=[render(processor, request)], return_tensors="pt", **media([request]))
    made = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    length = inputs["input_ids"].shape[1]
    tokens = made.sequences[0, length:].tolist()
    likeliest = [row[0].float().log_softmax(-1).topk(TOP) for row in made.logits]
    return {
        "prompt_tokens": length,
        "tokens": tokens,
        "logprobs": [dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) for top in likeliest],
        "text": processor.tokenizer.decode(tokens, skip_special_tokens=True),
    }


def save_request(folder: Path, index: int, request: Request) -> dict[str, Any]:
    """Write the images of a request, and return its record without answers."""

    def write(image: Any, name: str) -> str:
        path = folder / "inputs" / f"{index}_{name}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        return str(path.relative_to(folder))

    images = [write(image, str(place)) for place, image in enumerate(request.draw_images())]
    videos = [
        [write(frame, f"{video}_{place}") for place, frame in enumerate(frames)]
        for video, frames in enumerate(request.draw_videos())
    ]
    record = {"name": request.name, "conversation": request.conversation, "images": images, "videos": videos}
    return {**record, "right": request.answer, "answers": {}}


def make(name: str, folder: Path, kinds: Collection[str] = KINDS) -> None:
    """Build, train and save a composition, with these kinds of answers of `generate` and the adapter for "adapter"."""
    composition = COMPOSITIONS[name]
    model, processor = build(composition)
    train(model, processor, STEPS, composition.videos)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    records = [save_request(folder, index, request) for index, request in enumerate(composition.requests)]
    pairs = list(zip(records, composition.requests, strict=True))
    for record, request in pairs:
        record["prompt"] = render(processor, request)
    for kind in kinds:
        if kind == "adapter":
            layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
            answering = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=layers))
            train(answering, processor, STEPS // 2, composition.videos, prefix="It is ", rate=1e-2)
            answering.save_pretrained(folder / "adapter")
        else:
            answering = type(model).from_pretrained(folder, dtype=kind)
        for record, request in pairs:
            record["answers"][kind] = answer(answering, processor, request)
    (folder / "expected.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def is_made(folder: Path, kinds: Collection[str]) -> bool:
    """Whether the folder has a composition with these kinds of answers."""
    path = folder / "expected.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return bool(records) and all(set(kinds) <= record["answers"].keys() for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(COMPOSITIONS))
    options = parser.parse_args()
    for name in options.names:
        started = time.perf_counter()
        make(name, options.folder / name)
        records = json.loads((options.folder / name / "expected.json").read_text(encoding="utf-8"))
        right = sum(one["answers"]["float32"]["text"].strip() == one["right"] for one in records)
        print(f"{name}: {right} of {len(records)} answers right, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
