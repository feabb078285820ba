"""The plugin for vLLM in vLLM: the session `vllm` installs it and names its interpreter in VLPARTS_VLLM_PYTHON.

vLLM runs all models in one process, `plugin_jobs.py`, without a trust flag.
"""

from typing import Any

import pytest
import torch

from tests.serving.plugin_models import (
    COMPOSED,
    CONSTRAINTS,
    EXPERTS,
    GRAMMAR,
    NEW_TOKENS,
    NGRAMS,
    PROMPTS,
    REFUSED,
    SIZE,
    TEXT_MODELS,
    UNFIT,
    composed,
    run,
    text_model,
    text_requests,
)
from vlparts.parts.moe_options import SCORINGS

pytestmark = pytest.mark.timeout(7200)  # all engines start in one fixture


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of all jobs, and the answers of `generate` as `expected`."""
    scratch = tmp_path_factory.mktemp("vllm")
    jobs: dict[str, Any] = {"names": ["shared_names", {}], "control": ["match_router", {"config": None}]}
    expected: dict[str, Any] = {}
    for name in TEXT_MODELS:
        model, tokenizer = text_model(name, scratch / name)
        requests, expected[name] = text_requests(model, tokenizer, {})
        jobs[name] = ["serve", {"folder": str(scratch / name), "requests": requests}]
        if name == "moge":
            ours = {"hf_overrides": {"_experts_implementation": "vlparts_sorted"}}
            jobs["our experts"] = ["serve", {"folder": str(scratch / name), "requests": requests, **ours}]
        if name == "pangu":
            rows = [text_requests(model, tokenizer, options) for options in CONSTRAINTS.values()]
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
        requests, expected[name] = composed(name, scratch / name)
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
