"""Options of requests: what they ask for is what transformers' processors do, and bad ones are named."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.generation.test_constrained_coordinates import tokenizer
from vlparts.generation import CoordinateLogitsProcessor, WindowedNGramLogitsProcessor
from vlparts.serving.request_options import coordinate_processor, ngram_processor, read_coordinate_options

SIZE, WINDOW, ALLOWED = "no_repeat_ngram_size", "no_repeat_ngram_window_size", "no_repeat_ngram_allowed_ids"
OTHERS = {"session_id": "x", "ngram_size": "of another extension", "kv_transfer_params": {}}


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 4), max_size=6),
    answer=st.lists(st.integers(0, 4), max_size=24),
    size=st.integers(2, 5),
    extra=st.integers(0, 8),
    allowed=st.lists(st.integers(0, 6), max_size=3),
)
def test_the_ban_is_that_of_generate(
    prompt: list[int], answer: list[int], size: int, extra: int, allowed: list[int]
) -> None:
    """The server's processor sees the answer alone, that of `generate` the prompt before it too."""
    made = ngram_processor({SIZE: size, WINDOW: size + extra, ALLOWED: allowed, **OTHERS})
    wanted = WindowedNGramLogitsProcessor(size, size + extra, allowed, prompt_length=len(prompt))
    scores = torch.randn(1, 5)
    tokens = torch.tensor([prompt + answer], dtype=torch.int64)
    assert made is not None
    assert torch.equal(made(tokens[:, len(prompt) :], scores), wanted(tokens, scores))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    mode=st.sampled_from(["free", "answer"]),
    ordered=st.sampled_from([True, False, 1, 0]),
    levels=st.sampled_from([None, 1, 40, 1000]),
    label=st.integers(0, 4),
    limit=st.sampled_from([None, 19, 40]),
    prompt=st.integers(0, 5),
)
def test_the_grammar_is_that_of_generate(
    seed: int, mode: str, ordered: bool | int, levels: int | None, label: int, limit: int | None, prompt: int
) -> None:
    words = tokenizer()
    ids, forbidden = words.coordinate_token_ids(), words.token_ids_with("(")
    options = {
        "coordinate_mode": mode,
        "coordinate_ordered": ordered,
        "coordinate_levels": levels,
        "coordinate_max_label_tokens": label,
        "coordinate_forbidden_ids": forbidden,
        **OTHERS,
    }
    made = coordinate_processor(options, ids, [words.eos_token_id], len(words), limit)
    assert made is not None
    wanted = CoordinateLogitsProcessor(
        ids,
        prompt,
        words.eos_token_id,
        mode=mode,
        ordered=bool(ordered),
        levels=levels,
        max_label_tokens=label,
        forbidden=forbidden,
        max_length=None if limit is None else prompt + limit,
    )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, len(words), (1, prompt), generator=generator)
    rng = random.Random(seed)
    for _ in range(limit or 24):
        scores = torch.randn(1, len(words), generator=generator)
        result = wanted(tokens, scores)
        assert torch.equal(made(tokens[:, prompt:], scores), result)
        # Mostly a token of coordinates, so that regions begin; now and then one that violates the grammar.
        fitting = result[0].isfinite().nonzero()[:, 0].tolist()
        likely = [one for one in fitting if one in (ids.opening, ids.comma, ids.closing, *ids.digits)] or fitting
        chosen = rng.choice(rng.choice([likely, fitting, range(len(words))]))
        tokens = torch.cat([tokens, torch.tensor([[chosen]])], 1)


def test_kinds_need_markers_that_only_the_tokenizer_knows() -> None:
    options = {"coordinate_mode": "free", "coordinate_kinds": ["box", "point"]}
    marked, plain = tokenizer(markers=True), tokenizer()
    made = coordinate_processor(options, marked.coordinate_token_ids(), [marked.eos_token_id], len(marked))
    assert made is not None
    assert made.kinds == ("box", "point")
    with pytest.raises(ValueError, match="`kinds` can be several only if each has markers"):
        coordinate_processor(options, plain.coordinate_token_ids(), [plain.eos_token_id], len(plain))


def test_forbidden_ids_must_be_in_the_vocabulary() -> None:
    words = tokenizer()
    options = {"coordinate_mode": "free", "coordinate_forbidden_ids": [len(words)]}
    with pytest.raises(ValueError, match=f"`coordinate_forbidden_ids` must be below {len(words)}, got {len(words)}"):
        coordinate_processor(options, words.coordinate_token_ids(), [words.eos_token_id], len(words))


@pytest.mark.parametrize("options", [None, {}, OTHERS, {SIZE: None}, {"coordinate_mode": None}])
def test_nothing_is_asked_for(options: dict[str, Any] | None) -> None:
    assert ngram_processor(options) is None
    assert read_coordinate_options(options) is None


def test_size_0_switches_the_ban_off() -> None:
    assert ngram_processor({SIZE: 0}) is None
    assert ngram_processor({SIZE: 0, WINDOW: 90}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({WINDOW: 90}, f"`{WINDOW}` needs `{SIZE}`, got 90 without it"),
        ({ALLOWED: [3]}, f"`{ALLOWED}` needs `{SIZE}`"),
        ({SIZE: 20}, f"`{SIZE}` needs `{WINDOW}`, got 20 without it"),
        ({SIZE: 1, WINDOW: 9}, f"`{SIZE}` must be an integer from 2 to 2147483647, got 1"),
        ({SIZE: True, WINDOW: 9}, f"`{SIZE}` must be an integer from 2 to 2147483647, got True"),
        ({SIZE: False}, f"`{SIZE}` must be an integer"),
        ({SIZE: "3", WINDOW: 9}, f"`{SIZE}` must be an integer from 2 to 2147483647, got '3'"),
        ({SIZE: 3.0, WINDOW: 9}, f"`{SIZE}` must be an integer from 2 to 2147483647, got 3.0"),
        ({SIZE: 3, WINDOW: 2}, f"`{WINDOW}` must be an integer from 3 to 2147483647, got 2"),
        ({SIZE: 3, WINDOW: 2**63}, f"`{WINDOW}` must be an integer from 3 to 2147483647, got {2**63}"),
        ({SIZE: 3, WINDOW: 9, ALLOWED: 5}, f"`{ALLOWED}` must be a list of token ids, got 5"),
        ({SIZE: 3, WINDOW: 9, ALLOWED: "5"}, f"`{ALLOWED}` must be a list of token ids, got '5'"),
        ({SIZE: 3, WINDOW: 9, ALLOWED: [-1]}, f"`{ALLOWED}` must be a list of token ids, got \\[-1\\]"),
        ({SIZE: 3, WINDOW: 9, ALLOWED: [2**31]}, f"`{ALLOWED}` must be a list of token ids"),
        ({SIZE: 3, WINDOW: 9, ALLOWED: ["td"]}, f"`{ALLOWED}` must be a list of token ids, got \\['td'\\]"),
        (
            {SIZE: 3, "no_repeat_ngram_window": 9},
            "`no_repeat_ngram_window` is unknown; options of this kind are no_",
        ),
    ],
)
def test_bad_options_of_the_ban(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ngram_processor(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinate_levels": 9}, "`coordinate_levels` needs `coordinate_mode`, got 9 without it"),
        ({"coordinate_mode": "strict"}, r"`coordinate_mode` must be one of \('free', 'answer'\), got 'strict'"),
        ({"coordinate_mode": ["free"]}, r"`coordinate_mode` must be one of .*, got \['free'\]"),
        ({"coordinate_mode": "free", "coordinate_kinds": "box"}, "`coordinate_kinds` must be a list .*, got 'box'"),
        ({"coordinate_mode": "free", "coordinate_kinds": []}, r"`coordinate_kinds` must be a list .*, got \[\]"),
        ({"coordinate_mode": "free", "coordinate_kinds": [1]}, r"`coordinate_kinds` must be a list .*, got \[1\]"),
        ({"coordinate_mode": "free", "coordinate_kinds": ["box"] * 2}, "`coordinate_kinds` must be .* distinct"),
        ({"coordinate_mode": "free", "coordinate_kinds": ["circle"]}, "'point', 'box', 'quad'.*, got .'circle'"),
        ({"coordinate_mode": "free", "coordinate_levels": 0}, "`coordinate_levels` must be an integer from 1 to"),
        ({"coordinate_mode": "free", "coordinate_ordered": "no"}, "`coordinate_ordered` must be true.*, got 'no'"),
        ({"coordinate_mode": "free", "coordinate_ordered": 2}, "`coordinate_ordered` must be .*, got 2"),
        ({"coordinate_mode": "free", "coordinate_ordered": 1.0}, "`coordinate_ordered` must be true.*, got 1.0"),
        (
            {"coordinate_mode": "free", "coordinate_max_label_tokens": -1},
            "`coordinate_max_label_tokens` must be an",
        ),
        ({"coordinate_mode": "free", "coordinate_forbidden_ids": 7}, "`coordinate_forbidden_ids` must be a list"),
        (
            {"coordinate_mode": "free", "coordinate_kind": ["box"]},
            "`coordinate_kind` is unknown; options of",
        ),
    ],
)
def test_bad_options_of_the_grammar(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_coordinate_options(options)
