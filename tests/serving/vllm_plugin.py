"""The plugin for vLLM in vLLM: the session `vllm` installs it and names its interpreter in VLPARTS_VLLM_PYTHON.

Models and expected answers are made here; vLLM runs them in one process, `plugin_jobs.py`, without a trust flag.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

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
from vlparts.parts.moe_options import SCORINGS
from vlparts.training.tokenizer import train_tokenizer

pytestmark = pytest.mark.timeout(3600)  # all engines start in one fixture

SOURCE = Path(__file__).parents[2] / "src"
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


def _tokenizer() -> Any:
    return train_tokenizer(["red green blue", "Which colours?", "user\n", "(012,345),(678,900)"] * 4)


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _text_model(name: str, folder: Path) -> tuple[PreTrainedModel, Any]:
    model_class, config_class, changes, _ = TEXT_MODELS[name]
    tokenizer = (
        PaddedCoordinateTokenizer.from_tokenizer(_tokenizer(), markers=BOX) if name == "pangu" else _tokenizer()
    )
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = config_class(**{**TEXT, **special, **changes}, vocab_size=len(tokenizer), rope_parameters=rope)
    model = order_one(model_class(config)).eval()
    _save(model, tokenizer, folder)
    return model, tokenizer


def _requested(tokenizer: Any, options: dict[str, Any], prompt_length: int) -> list[LogitsProcessor]:
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


def _answer(model: PreTrainedModel, tokenizer: Any, inputs: Any, options: dict[str, Any]) -> dict[str, Any]:
    length = inputs["input_ids"].shape[1]
    processors = LogitsProcessorList(_requested(tokenizer, options, length))
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, logits_processor=processors)
    return {"tokens": made[0, length:].tolist(), "prompt_tokens": length}


def _text_requests(model: PreTrainedModel, tokenizer: Any, options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    requests = [{"prompt": prompt, "new_tokens": NEW_TOKENS, "extra_args": options or None} for prompt in PROMPTS]
    return requests, [_answer(model, tokenizer, tokenizer(one, return_tensors="pt"), options) for one in PROMPTS]


def _composed(name: str, folder: Path) -> tuple[list[Any], list[Any]]:
    """Save a composed model, and return requests and answers."""
    config_class, changes, _ = COMPOSED[name]
    tokenizer = _tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = config_class(**{**TEXT, **special, **changes}, vocab_size=len(tokenizer))
    model = compose(vision=NaViTConfig(**VISION, patch_size=8, spatial_merge_size=2), text=text)
    size = {"shortest_edge": 256, "longest_edge": 64 * 64}
    images = NaViTImageProcessor(patch_size=8, merge_size=2, size=size)
    processor = compose_processor(model, tokenizer, image_processor=images)
    _save(order_one(model).eval(), processor, folder)
    requests, answers = [], []
    for index, colours in enumerate([(), ("red",), ("blue", "green")]):
        blocks = [{"type": "image"} for _ in colours] + [{"type": "text", "text": PROMPTS[index]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": blocks}], add_generation_prompt=True)
        pictures = [Image.new("RGB", (40 + 16 * index, 64), colour) for colour in colours]
        names = [f"{index}-{colour}.png" for colour in colours]
        for file, picture in zip(names, pictures, strict=True):
            picture.save(folder / file)
        inputs = processor(text=prompt, **({"images": pictures} if pictures else {}), return_tensors="pt")
        requests.append({"prompt": prompt, "images": names, "new_tokens": NEW_TOKENS})
        answers.append(_answer(model, tokenizer, inputs, {}))
    return requests, answers


def run(jobs: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run jobs with vLLM, which finds vlparts and its entry points on the path and is told to trust nothing."""
    installed = scratch / "installed" / "vlparts-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: vlparts\nVersion: 0\n", encoding="utf-8")
    (installed / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nvlparts = vlparts.serving.vllm_models:register\n", encoding="utf-8"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(installed.parent)]),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(scratch / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    files = scratch / "jobs.json", scratch / "results.json"
    files[0].write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).with_name("plugin_jobs.py")
    command = [os.environ["VLPARTS_VLLM_PYTHON"], "-P", str(script), *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert files[1].exists(), done.stderr[-5000:]
    return json.loads(files[1].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of all jobs, and the answers of `generate` as `expected`."""
    scratch = tmp_path_factory.mktemp("vllm")
    jobs: dict[str, Any] = {"names": ["shared_names", {}], "control": ["match_router", {"config": None}]}
    expected: dict[str, Any] = {}
    for name in TEXT_MODELS:
        model, tokenizer = _text_model(name, scratch / name)
        requests, expected[name] = _text_requests(model, tokenizer, {})
        jobs[name] = ["serve", {"folder": str(scratch / name), "requests": requests}]
        if name == "moge":
            ours = {"hf_overrides": {"_experts_implementation": "vlparts_sorted"}}
            jobs["our experts"] = ["serve", {"folder": str(scratch / name), "requests": requests, **ours}]
        if name == "pangu":
            rows = [_text_requests(model, tokenizer, options) for options in CONSTRAINTS.values()]
            asked = [one for requests, _ in rows for one in requests]
            expected["constraints"] = [one for _, answers in rows for one in answers]
            more = [*REFUSED.values(), UNFIT, {}]
            asked += [{"prompt": PROMPTS[0], "new_tokens": NEW_TOKENS, "extra_args": one or None} for one in more]
            chosen = {"logits_processors": [NGRAMS, GRAMMAR]}
            jobs["constraints"] = ["serve", {"folder": str(scratch / name), "requests": asked, **chosen}]
            defaults = {"override_generation_config": CONSTRAINTS["bigrams"], "logits_processors": [NGRAMS]}
            requests = [
                {"prompt": PROMPTS[0], "new_tokens": NEW_TOKENS, "extra_args": one} for one in (None, {SIZE: 0})
            ]
            jobs["defaults"] = ["serve", {"folder": str(scratch / name), "requests": requests, **defaults}]
    for name in COMPOSED:
        requests, expected[name] = _composed(name, scratch / name)
        limits = {"limit_mm_per_prompt": {"image": 2}}
        jobs[name] = ["serve", {"folder": str(scratch / name), "requests": requests, **limits}]
    for scoring in SCORINGS:
        for groups in (1, 2, 4):
            changes = {**EXPERTS, "num_expert_groups": groups, "scoring": scoring, "router_scale": False}
            jobs[f"router {scoring} {groups}"] = ["match_router", {"config": changes}]
    generator = torch.Generator().manual_seed(0)
    histories = [torch.randint(0, 4, (length,), generator=generator).tolist() for length in range(24)]
    options = {"extra_args": CONSTRAINTS["bigrams"], "histories": histories, "vocab_size": 4}
    jobs["runners"] = ["both_runners", options]
    return {**run(jobs, scratch), "expected": expected}


@pytest.mark.parametrize("name", [*TEXT_MODELS, *COMPOSED])
def test_answers_are_those_of_generate_without_trust(served: dict[str, Any], name: str) -> None:
    assert served[name].get("rows") == served["expected"][name], served[name].get("error")
    assert served[name]["class"] == (TEXT_MODELS.get(name) or COMPOSED[name])[-1]
    assert not any(module.startswith("transformers_modules") for module in served[name]["modules"])


@pytest.mark.parametrize("name", ["moge", "moge_one_group", "composed_moge"])
def test_our_router_stays(served: dict[str, Any], name: str) -> None:
    assert "vlparts.parts.moe_router" in served[name]["modules"]


def test_our_experts_stay_where_they_are_asked_for(served: dict[str, Any]) -> None:
    assert served["our experts"]["class"] == "TransformersForCausalLM"
    assert served["our experts"]["rows"] == served["expected"]["moge"]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_vllm_does_not_take_the_router_for_a_plain_choice(served: dict[str, Any], scoring: str, groups: int) -> None:
    assert served[f"router {scoring} {groups}"] is False


def test_vllm_does_take_the_router_of_qwen3_for_one(served: dict[str, Any]) -> None:
    assert served["control"] is True


def test_constraints_are_those_of_generate(served: dict[str, Any]) -> None:
    rows, expected = served["constraints"]["rows"], served["expected"]["constraints"]
    assert rows[: len(expected)] == expected
    tokens = [tuple(row["tokens"]) for row in expected]
    free = tokens[: len(PROMPTS)]
    for index in range(1, len(CONSTRAINTS)):  # each changes some answer
        assert tokens[index * len(PROMPTS) : (index + 1) * len(PROMPTS)] != free


def test_bad_options_are_refused_and_the_engine_goes_on(served: dict[str, Any]) -> None:
    *_, first, second, unfit, last = served["constraints"]["rows"]
    for row, message in zip((first, second), REFUSED, strict=True):
        assert message in row["refused"]
    assert len(unfit["tokens"]) == 1
    assert last == served["expected"]["pangu"][0]


def test_the_folder_has_the_default(served: dict[str, Any]) -> None:
    banned, free = served["defaults"]["rows"]
    assert banned == served["expected"]["constraints"][len(PROMPTS)]
    assert free == served["expected"]["pangu"][0]


def test_both_model_runners_give_the_same(served: dict[str, Any]) -> None:
    assert served["runners"] == [[True] * 24] * 2


def test_names_that_vllm_has_too(served: dict[str, Any]) -> None:
    """The plugin goes by `model_type`, so that vLLM's own models keep their classes."""
    assert served["names"] == ["PanguEmbeddedForCausalLM"]
