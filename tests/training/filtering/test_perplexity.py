"""Perplexity against float64 without batches, and the choice of the lowest."""

import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.tiny import order_one, text_config
from tests.training.filtering.making import language_model
from tests.training.making import metaspace_tokenizer
from vlparts.training.filtering import compute_perplexities, select_lowest
from vlparts.training.filtering.perplexity import WINDOW, like_length

TEXTS = ["A cat.", "", "Where is the cat? " * 9, "x", "cat", "It is here, at the left of 12 dogs.", "A cat."]


def oracle(model: Any, ids: list[int]) -> float | None:
    """One text, token by token, in float64."""
    if len(ids) < 2:
        return None
    total = 0.0
    for count in range(1, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:count]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[ids[count]])
    return math.exp(-total / (len(ids) - 1))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@torch.no_grad()
def test_perplexities_are_those_of_each_text_alone(kind: str, batch_size: int) -> None:
    model, words = language_model(kind)
    found = compute_perplexities(model, words, TEXTS, batch_size=batch_size)
    double = order_one(AutoModelForCausalLM.from_config(text_config(kind, words))).double().eval()
    for text, one in zip(TEXTS, found, strict=True):
        ids = words(text)["input_ids"]
        assert one.tokens == max(len(ids) - 1, 0)
        expected = oracle(double, ids)
        assert one.value == (None if expected is None else pytest.approx(expected, rel=1e-4))


@torch.no_grad()
def test_a_token_that_begins_texts_gives_the_first_word_a_probability() -> None:
    words = metaspace_tokenizer()
    model = order_one(AutoModelForCausalLM.from_config(text_config("llama", words))).eval()
    ids = words("cat")["input_ids"]
    assert ids[0] == words.bos_token_id
    (found,) = compute_perplexities(model, words, ["cat"])
    assert found.tokens == len(ids) - 1
    assert found.value == pytest.approx(oracle(model.double(), ids), rel=1e-4)


def test_only_the_first_tokens_are_scored_on_request() -> None:
    model, words = language_model()
    text = "Where is the cat? " * 9
    start = words.decode(words(text)["input_ids"][:12])
    cut, whole = compute_perplexities(model, words, [text, start], max_length=12)
    assert cut == whole
    assert cut.tokens == 11


def test_texts_that_are_too_long_for_the_model() -> None:
    model, words = language_model()
    most = model.config.max_position_embeddings
    try:
        model.config.max_position_embeddings = 10
        with pytest.raises(ValueError, match="The text has 12 tokens, more than the 10 that `model` takes"):
            compute_perplexities(model, words, ["0123456789ab"])
        with pytest.raises(ValueError, match="`max_length` must be from 2 to the 10 tokens .*, got 11"):
            compute_perplexities(model, words, ["0"], max_length=11)
        assert compute_perplexities(model, words, ["0123456789ab"], max_length=10)[0].tokens == 9
    finally:
        model.config.max_position_embeddings = most


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_size", 1.5), ("max_length", 1)])
def test_invalid_arguments(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be .*, got {value}"):
        compute_perplexities(*language_model(), ["a cat"], **{name: value})


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_model_without_numbers(weight: float) -> None:
    _, words = language_model()
    model = order_one(AutoModelForCausalLM.from_config(text_config("qwen3", words))).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(weight)
    with pytest.raises(ValueError, match="`model` must give finite perplexities, got nan for text 0"):
        compute_perplexities(model, words, ["a cat"])


@given(st.lists(st.integers(0, 5)), st.integers(1, 999))
def test_the_lowest_share_by_rank(values: list[int], thousandths: int) -> None:
    """Value 0 stands for a text without perplexity."""
    keep = thousandths / 1000
    scored = [(value, index) for index, value in enumerate(values) if value]
    count = int(Decimal(thousandths) * len(scored) / 1000)
    expected = sorted(index for _, index in sorted(scored)[:count])
    assert select_lowest([value or math.nan for value in values], keep).tolist() == expected


def test_shares_are_decimal() -> None:
    """0.29 * 100 is 28.999999999999996 in floats."""
    assert len(select_lowest(range(100), 0.29)) == 29
    assert len(select_lowest(range(10), 1)) == 10


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, float("nan"), "0.2", True])
def test_shares_that_are_none(keep: Any) -> None:
    with pytest.raises(ValueError, match="`keep` must be a number above 0 and at most 1, got"):
        select_lowest([1.0], keep)


@given(st.lists(st.integers(0, 9), max_size=300), st.integers(1, 4))
def test_batches_have_every_item_once_and_are_made_a_window_at_a_time(items: list[int], size: int) -> None:
    read = 0

    def counted() -> Any:
        nonlocal read
        for item in items:
            read += 1
            yield item

    seen: list[int] = []
    for batch in like_length(counted(), size, lambda item: item):
        assert 1 <= len(batch) <= size
        assert batch == sorted(batch, reverse=True)
        seen += batch
        assert read - len(seen) < size * WINDOW
    assert sorted(seen) == sorted(items)
