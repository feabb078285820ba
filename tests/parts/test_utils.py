"""Helpers of parts/: logits to keep, token inputs, minimum sizes, integers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import Cache

from vlparts.parts.utils import activation_dtype, check_minimum, check_token_inputs, positive_integer, slice_for_logits


@pytest.mark.parametrize(
    ("logits_to_keep", "positions"), [(0, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3]), (torch.tensor([2, 0]), [2, 0])]
)
def test_the_states_of_the_logits_to_keep(logits_to_keep: Any, positions: list[int]) -> None:
    hidden = torch.randn(2, 4, 3)
    assert torch.equal(slice_for_logits(hidden, logits_to_keep), hidden[:, positions])


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_eight_bits_do_not_tell_the_dtype_of_activations(stored: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LayerNorm(3)).to(torch.bfloat16)
    model[0].weight = nn.Parameter(model[0].weight.detach().to(stored), requires_grad=False)
    assert activation_dtype(model, torch.float64) == torch.bfloat16
    assert activation_dtype(model[0], torch.float64) == torch.float64


def test_exactly_one_of_ids_and_embeddings() -> None:
    ids, embeds = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 3)
    check_token_inputs(ids, None)
    check_token_inputs(None, embeds)
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given, got both"):
        check_token_inputs(ids, embeds)
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given, got none"):
        check_token_inputs(None, None)


BAD_TOKENS = [
    ({"input_ids": torch.zeros(4, dtype=torch.int64)}, r"`input_ids` must have shape \(any, any\), got \(4,\)"),
    ({"input_ids": torch.zeros(2, 4)}, "`input_ids` must be int32 or int64, got torch.float32"),
    ({"input_ids": torch.full((2, 4), 9)}, "`input_ids` must be between 0 and 8, got 9 to 9"),
    ({"input_ids": torch.tensor([[3, -1]])}, "`input_ids` must be between 0 and 8, got -1 to 3"),
    (
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 4, 6)},
        r"`inputs_embeds` .* \(any, any, 5\), got \(2,",
    ),
    ({"attention_mask": torch.ones(2, 3)}, r"`attention_mask` must have shape \(2, 4\), got \(2, 3\)"),
    ({"attention_mask": torch.ones(2, 5)}, r"`attention_mask` must have shape \(2, 4\), got \(2, 5\)"),
    ({"attention_mask": torch.ones(1, 4)}, r"`attention_mask` must have shape \(2, 4\), got \(1, 4\)"),
    ({"attention_mask": torch.ones(4)}, r"`attention_mask` must have shape \(2, 4\), got \(4,\)"),
    ({"position_ids": torch.arange(4)}, r"`position_ids` must have shape \(2, 4\), got \(4,\)"),
    ({"position_ids": torch.zeros(3, 4)}, r"`position_ids` must have shape \(2, 4\), got \(3, 4\)"),
    ({"position_ids": torch.zeros(3, 2, 5)}, r"`position_ids` must have shape \(any, 2, 4\), got \(3, 2, 5\)"),
]


def filled_cache(kind: type[Cache], tokens: int, **options: Any) -> Cache:
    cache = kind(config=LlamaConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=4), **options)
    cache.update(torch.zeros(2, 1, tokens, 4), torch.zeros(2, 1, tokens, 4), 0)
    return cache


@pytest.mark.parametrize(("changes", "message"), BAD_TOKENS)
def test_shapes_and_ranges_of_token_inputs(changes: dict[str, Any], message: str) -> None:
    inputs = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "inputs_embeds": None, **changes}
    with pytest.raises(ValueError, match=message):
        check_token_inputs(**inputs, vocab_size=9, width=5)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_mask": torch.ones(2, 4), "position_ids": torch.zeros(1, 4)},
        {"attention_mask": torch.ones(2, 1, 4, 4), "position_ids": torch.zeros(4, 2, 4)},
        {"attention_mask": {"full_attention": None}, "position_ids": torch.zeros(4, 1, 4)},
        {"input_ids": torch.empty(2, 0, dtype=torch.int64)},
        {"attention_mask": torch.ones(2, 7), "past_key_values": filled_cache(DynamicCache, 3)},
        {"attention_mask": torch.ones(2, 9), "past_key_values": filled_cache(StaticCache, 3, max_cache_len=9)},
        {"input_ids": torch.empty(2, 4, dtype=torch.int64, device="meta")},
    ],
)
def test_token_inputs_that_fit(changes: dict[str, Any]) -> None:
    inputs = {"input_ids": torch.full((2, 4), 8), "inputs_embeds": None, **changes}
    check_token_inputs(**inputs, vocab_size=9)


def test_a_mask_of_the_new_tokens_alone_is_refused_with_a_cache() -> None:
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(2, 7\), got \(2, 4\)"):
        check_token_inputs(
            torch.zeros(2, 4, dtype=torch.int64),
            None,
            attention_mask=torch.ones(2, 4),
            past_key_values=filled_cache(DynamicCache, 3),
        )


def test_fields_have_a_minimum() -> None:
    config = LlamaConfig(num_hidden_layers=0)
    check_minimum(config, 0, "hidden_size", "num_hidden_layers")
    with pytest.raises(ValueError, match="`num_hidden_layers` must be at least 1, got 0"):
        check_minimum(config, 1, "hidden_size", "num_hidden_layers")


@pytest.mark.parametrize("value", [1, 7, np.int64(7), torch.tensor(7)])
def test_positive_integers_become_python_ints(value: Any) -> None:
    number = positive_integer(value, "count")
    assert type(number) is int
    assert number == int(value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_other_values_are_no_positive_integers(value: Any) -> None:
    with pytest.raises(ValueError, match=f"`count` must be an integer of at least 1, got {value!r}"):
        positive_integer(value, "count")
