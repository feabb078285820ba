"""The windowed ban on n-grams, against a loop over them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.parts.test_vlm_views import composed
from vlparts.generation import WindowedNGramLogitsProcessor


def banned_by_loops(answer: list[int], size: int, window: int, allowed: set[int]) -> set[int]:
    """As in DeepSeek-OCR's programs, one n-gram after another."""
    if len(answer) < size:
        return set()
    prefix = answer[len(answer) - size + 1 :]
    banned = set()
    for start in range(max(0, len(answer) - window), len(answer) - size + 1):
        ngram = answer[start : start + size]
        if ngram[:-1] == prefix:
            banned.add(ngram[-1])
    return banned - allowed


@given(
    rows=st.integers(1, 3),
    length=st.integers(0, 30),
    prompt=st.integers(0, 5),
    size=st.integers(2, 5),
    extra=st.integers(0, 20),
    allowed=st.sets(st.integers(0, 3)),
    seed=st.integers(0, 1000),
)
def test_equals_a_loop(
    rows: int, length: int, prompt: int, size: int, extra: int, allowed: set[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(0, 4, (rows, length), generator=generator)
    ids = torch.cat((torch.randint(0, 4, (rows, prompt), generator=generator), answers), dim=1)
    processor = WindowedNGramLogitsProcessor(size, size + extra, sorted(allowed), prompt_length=prompt)
    scores = torch.randn(rows, 6, generator=generator)
    found = processor(ids, scores)
    for row in range(rows):
        expected = banned_by_loops(answers[row].tolist(), size, size + extra, allowed)
        assert set(found[row].isinf().nonzero().flatten().tolist()) == expected
        kept = [token for token in range(6) if token not in expected]
        assert torch.equal(found[row, kept], scores[row, kept])


def test_the_prompt_is_not_compared() -> None:
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    scores = torch.zeros(1, 5)
    assert WindowedNGramLogitsProcessor(3, 10)(ids, scores)[0, 3] == -torch.inf
    assert torch.equal(WindowedNGramLogitsProcessor(3, 10, prompt_length=3)(ids, scores), scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ngram_size": 1, "window_size": 5}, "`ngram_size` must be at least 2, got 1"),
        ({"ngram_size": 5, "window_size": 4}, "`window_size` must be at least `ngram_size`=5, got 4"),
        ({"ngram_size": 2, "window_size": 4, "prompt_length": -1}, "`prompt_length` must be at least 0, got -1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowedNGramLogitsProcessor(**options)


@pytest.mark.parametrize("given", ["configuration", "argument"])
def test_generate_bans_what_the_answer_repeats(given: str) -> None:
    model, processor = composed("qwen3")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are equally likely, so that the first is chosen
    inputs = processor(text=["no image"], return_tensors="pt")
    plain = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    start = inputs["input_ids"].shape[1]
    assert len(set(model.generate(**inputs, **plain)[0, start:].tolist())) == 1
    options = {"no_repeat_ngram_size": 2, "no_repeat_ngram_window_size": 20}
    if given == "configuration":
        for name, value in options.items():
            setattr(model.generation_config, name, value)
        options = {}
    answer = model.generate(**inputs, **plain, **options)[0, start:].tolist()
    pairs = list(zip(answer, answer[1:], strict=False))
    assert len(answer) == 9
    assert len(set(pairs)) == len(pairs)
