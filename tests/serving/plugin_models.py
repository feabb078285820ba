"""Small models with random weights, the answers of `generate`, and vLLM with the plugin to compare with."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from tests.serving.vllm_process import ROOT, vllm_environment
from tests.tiny import order_one
from vlparts import (
    MoGEConfig,
    MoGEForCausalLM,
    NaViTConfig,
    NaViTImageProcessor,
    PaddedCoordinateTokenizer,
    PanguEmbeddedConfig,
    PanguEmbeddedForCausalLM,
    compose,
    compose_processor,
)
from vlparts.generation import CoordinateLogitsProcessor, WindowedNGramLogitsProcessor
from vlparts.training.tokenizer import train_tokenizer

PROMPTS = ("red green", "Which colours?", "user\nblue")
NEW_TOKENS = 40
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**VISION, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "bos_token_id": None}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 4, "num_expert_groups": 4, "moe_intermediate_size": 64}
GROUPS = {**EXPERTS, "shared_expert_intermediate_size": 64}
ONE_GROUP = {**GROUPS, "num_expert_groups": 1, "router_scale": False}
QWEN3_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
BOX = {"box_start": "<|box_start|>", "box_end": "<|box_end|>"}
NGRAMS, GRAMMAR = "vlparts.serving.vllm_logits:WindowedNGrams", "vlparts.serving.vllm_logits:Coordinates"
SIZE, WINDOW = "no_repeat_ngram_size", "no_repeat_ngram_window_size"

# Class of the model, class of its configuration, changes of the configuration, vLLM's class.
TEXT_MODELS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "pangu": (PanguEmbeddedForCausalLM, PanguEmbeddedConfig, {}, "TransformersForCausalLM"),
    "moge": (MoGEForCausalLM, MoGEConfig, GROUPS, "TransformersMoEForCausalLM"),
    "moge_one_group": (MoGEForCausalLM, MoGEConfig, ONE_GROUP, "TransformersMoEForCausalLM"),
    # vLLM's experts always apply SiLU.
    "moge_gelu": (MoGEForCausalLM, MoGEConfig, {**GROUPS, "hidden_act": "gelu"}, "TransformersForCausalLM"),
}
COMPOSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "composed": (Qwen3Config, {}, "TransformersMultiModalForCausalLM"),
    "composed_moge": (MoGEConfig, GROUPS, "TransformersMultiModalMoEForCausalLM"),
    "composed_qwen3_moe": (Qwen3MoeConfig, QWEN3_EXPERTS, "TransformersMultiModalMoEForCausalLM"),
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "none": {},
    "bigrams": {SIZE: 2, WINDOW: 20},
    "trigrams": {SIZE: 3, WINDOW: 40, "no_repeat_ngram_allowed_ids": [5, 6]},
    "answer": {"coordinate_mode": "answer"},
    "labelled answer": {"coordinate_mode": "answer", "coordinate_max_label_tokens": 3, "coordinate_levels": 100},
    # Most tokens are forbidden, so that regions begin.
    "free": {"coordinate_mode": "free", "coordinate_ordered": 0, "coordinate_forbidden_ids": list(range(30, 280))},
}
REFUSED: dict[str, dict[str, Any]] = {
    f"`{SIZE}` needs `{WINDOW}`, got 3 without it": {SIZE: 3},
    "`coordinate_mode` must be one of ('free', 'answer'), got 'box'": {"coordinate_mode": "box"},
}
UNFIT = {"coordinate_mode": "free", "coordinate_levels": 2000}  # codes of three digits end at 999


def make_tokenizer(coordinates: bool = False) -> Any:
    plain = train_tokenizer(["red green blue", "Which colours?", "user\n", "(012,345),(678,900)"] * 4)
    return PaddedCoordinateTokenizer.from_tokenizer(plain, markers=BOX) if coordinates else plain


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text_model(name: str, folder: Path) -> tuple[PreTrainedModel, Any]:
    model_class, config_class, changes, _ = TEXT_MODELS[name]
    tokenizer = make_tokenizer(coordinates=name == "pangu")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = config_class(**{**TEXT, **special, **changes}, vocab_size=len(tokenizer), rope_parameters=rope)
    model = order_one(model_class(config)).eval()
    save(model, tokenizer, folder)
    return model, tokenizer


def requested(tokenizer: Any, options: dict[str, Any], prompt_length: int) -> list[LogitsProcessor]:
    """The processors of `generate` for the options of a request."""
    if SIZE in options:
        allowed = options.get("no_repeat_ngram_allowed_ids", ())
        return [WindowedNGramLogitsProcessor(options[SIZE], options[WINDOW], allowed, prompt_length)]
    if "coordinate_mode" in options:
        arguments = {name.removeprefix("coordinate_").removesuffix("_ids"): value for name, value in options.items()}
        ids = tokenizer.coordinate_token_ids()
        limit = prompt_length + NEW_TOKENS
        return [CoordinateLogitsProcessor(ids, prompt_length, tokenizer.eos_token_id, max_length=limit, **arguments)]
    return []


def answer(model: PreTrainedModel, tokenizer: Any, inputs: Any, options: dict[str, Any]) -> dict[str, Any]:
    length = inputs["input_ids"].shape[1]
    processors = LogitsProcessorList(requested(tokenizer, options, length))
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, logits_processor=processors)
    return {"tokens": made[0, length:].tolist(), "prompt_tokens": length}


def text_requests(model: PreTrainedModel, tokenizer: Any, options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    requests = [{"prompt": prompt, "new_tokens": NEW_TOKENS, "extra_args": options or None} for prompt in PROMPTS]
    return requests, [answer(model, tokenizer, tokenizer(one, return_tensors="pt"), options) for one in PROMPTS]


def compose_with(text_class: Any, tokenizer: Any, folder: Path, **changes: Any) -> tuple[PreTrainedModel, Any]:
    """Save a NaViT with a text model, and return the model and its processor."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = text_class(**{**TEXT, **special, **changes}, vocab_size=len(tokenizer))
    model = compose(vision=NaViTConfig(**VISION, patch_size=8, spatial_merge_size=2), text=text)
    size = {"shortest_edge": 256, "longest_edge": 64 * 64}
    images = NaViTImageProcessor(patch_size=8, merge_size=2, size=size)
    processor = compose_processor(model, tokenizer, image_processor=images)
    save(order_one(model).eval(), processor, folder)
    return model, processor


def conversation_about(index: int, folder: Path) -> tuple[list[dict[str, Any]], list[str], list[Image.Image]]:
    """A conversation about as many images, with the names of their files in the folder, and the images."""
    colours = ("red", "blue", "green")[:index]
    blocks = [{"type": "image"} for _ in colours] + [{"type": "text", "text": PROMPTS[index]}]
    pictures = [Image.new("RGB", (40 + 16 * index, 64), colour) for colour in colours]
    names = [f"{index}-{colour}.png" for colour in colours]
    for file, picture in zip(names, pictures, strict=True):
        picture.save(folder / file)
    return [{"role": "user", "content": blocks}], names, pictures


def composed(name: str, folder: Path) -> tuple[list[Any], list[Any]]:
    """Save a composed model, and return requests and answers."""
    text_class, changes, _ = COMPOSED[name]
    tokenizer = make_tokenizer()
    model, processor = compose_with(text_class, tokenizer, folder, **changes)
    requests, answers = [], []
    for index in range(len(PROMPTS)):
        conversation, names, pictures = conversation_about(index, folder)
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = processor(text=prompt, **({"images": pictures} if pictures else {}), return_tensors="pt")
        requests.append({"prompt": prompt, "images": names, "new_tokens": NEW_TOKENS})
        answers.append(answer(model, tokenizer, inputs, {}))
    return requests, answers


def run(jobs: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run jobs with vLLM, which finds vlparts and its entry points on the path and is told to trust nothing.

    The interpreter of vLLM's environment is in VLPARTS_VLLM_PYTHON.
    """
    installed = scratch / "installed" / "vlparts-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: vlparts\nVersion: 0\n", encoding="utf-8")
    (installed / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nvlparts = vlparts.serving.vllm_models:register\n", encoding="utf-8"
    )
    files = scratch / "jobs.json", scratch / "results.json"
    files[0].write_text(json.dumps(jobs), encoding="utf-8")
    command = [os.environ["VLPARTS_VLLM_PYTHON"], "-P", "-m", "tests.serving.plugin_jobs", *map(str, files)]
    environment = vllm_environment(scratch, [ROOT / "src", installed.parent])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert files[1].exists(), done.stderr[-5000:]
    return json.loads(files[1].read_text(encoding="utf-8"))
