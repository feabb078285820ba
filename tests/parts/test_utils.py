"""Helpers of parts/: logits to keep, token inputs, minimum sizes, integers."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from vlparts.parts.utils import check_minimum, check_token_inputs, positive_integer, slice_for_logits


@pytest.mark.parametrize(
    ("logits_to_keep", "positions"), [(0, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3]), (torch.tensor([2, 0]), [2, 0])]
)
def test_the_states_of_the_logits_to_keep(logits_to_keep: Any, positions: list[int]) -> None:
    hidden = torch.randn(2, 4, 3)
    assert torch.equal(slice_for_logits(hidden, logits_to_keep), hidden[:, positions])


def test_exactly_one_of_ids_and_embeddings() -> None:
    ids, embeds = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 3)
    check_token_inputs(ids, None)
    check_token_inputs(None, embeds)
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given, got both"):
        check_token_inputs(ids, embeds)
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given, got none"):
        check_token_inputs(None, None)


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
