"""The plugin and its logits processors in `vllm serve`, asked by the OpenAI client as in the documentation.

As `vllm_plugin.py`, of which this is the part that a user does by hand: one server, one model, requests at once.
"""

from itertools import product
from typing import Any

import pytest
from transformers import Qwen3Config

from tests.serving.plugin_models import (
    CONSTRAINTS,
    GRAMMAR,
    NEW_TOKENS,
    NGRAMS,
    PROMPTS,
    REFUSED,
    UNFIT,
    answer,
    compose_with,
    conversation_about,
    make_tokenizer,
    run,
)

pytestmark = pytest.mark.timeout(7200)  # a server starts

WAYS = ("streamed", "whole", "completion")
# Values as JSON has them, and what is wrong with them.
REFUSED_AS_JSON = {**REFUSED, "`no_repeat_ngram_size` must be an integer": {"no_repeat_ngram_size": "3"}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Any]:
    """By constraint, way and prompt the answer of the server and that of `generate`; by message what is refused."""
    scratch = tmp_path_factory.mktemp("http")
    tokenizer = make_tokenizer(coordinates=True)
    model, processor = compose_with(Qwen3Config, tokenizer, scratch / "model")
    # Placeholders, which the folder's generation options exclude; vLLM does not read that option.
    bias = {str(token): -100 for token in model.generation_config.suppress_tokens or ()}
    asked: dict[tuple[str, ...], dict[str, Any]] = {}
    expected: dict[tuple[str, ...], dict[str, Any]] = {}
    for (name, options), way, index in product(CONSTRAINTS.items(), WAYS, range(len(PROMPTS))):
        conversation, files, pictures = conversation_about(index, scratch / "model")
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        request = {"conversation": conversation, "images": files, "stream": way == "streamed"}
        if way == "completion":
            text, pictures, request = PROMPTS[index], [], {"prompt": PROMPTS[index]}
        inputs = processor(text=text, **({"images": pictures} if pictures else {}), return_tensors="pt")
        extra = {"vllm_xargs": options, "logit_bias": bias}
        asked[name, way, str(index)] = {**request, "new_tokens": NEW_TOKENS, "extra": extra}
        expected[name, way, str(index)] = answer(model, tokenizer, inputs, options)
    bad = {**REFUSED_AS_JSON, "unfit": UNFIT}
    for name, options in bad.items():
        request = {"prompt": PROMPTS[0], "new_tokens": NEW_TOKENS, "extra": {"vllm_xargs": options}}
        asked[(name,)] = request
    # All requests come at once: the server's cache of processed images then sometimes misses an image that the engine
    # has dropped, which vLLM answers by status 500 ("P0/P1 cache drift"). Without the cache every 500 is an error.
    options = {"limit_mm_per_prompt": {"image": 2}, "logits_processors": [NGRAMS, GRAMMAR], "mm_processor_cache_gb": 0}
    job = {"folder": str(scratch / "model"), "requests": list(asked.values()), **options}
    found = run({"http": ["ask_server", job]}, scratch)["http"]
    assert isinstance(found, list), found
    return {key: (row, expected.get(key)) for key, row in zip(asked, found, strict=True)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_answers_are_those_of_generate_with_our_processors(served: dict[Any, Any], name: str, way: str) -> None:
    for index in range(len(PROMPTS)):
        found, expected = served[name, way, str(index)]
        assert found == expected


@pytest.mark.parametrize("name", [name for name in CONSTRAINTS if name != "none"])
def test_each_constraint_changes_some_answer(served: dict[Any, Any], name: str) -> None:
    keys = [(way, str(index)) for way in WAYS for index in range(len(PROMPTS))]
    assert [served[name, *key][0] for key in keys] != [served["none", *key][0] for key in keys]


@pytest.mark.parametrize("message", REFUSED_AS_JSON)
def test_bad_options_are_refused(served: dict[Any, Any], message: str) -> None:
    assert message in served[(message,)][0]["refused"]


def test_options_that_do_not_fit_the_tokenizer_give_an_empty_answer(served: dict[Any, Any]) -> None:
    assert len(served[("unfit",)][0]["tokens"]) == 1
