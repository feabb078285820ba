"""Errors of constrained generation."""

import pytest
import torch
from torch import Tensor

from tests.generation.test_constrained_coordinates import processor, tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "strict"}, "`mode` must be one of"),
        ({"prompt_length": -1}, "`prompt_length` must be a non-negative integer, got -1"),
        ({"max_label_tokens": -1}, "`max_label_tokens` must be a non-negative"),
        ({"eos_token_id": []}, "`eos_token_id` must be ids"),
        ({"eos_token_id": 12, "forbidden": [12]}, "`eos_token_id` must be ids that coordinates do not use"),
        ({"kinds": ["circle"]}, "`kinds` must be distinct names"),
        ({"kinds": "box"}, "`kinds` must be distinct names"),
        ({"kinds": ["box", "point"]}, "`kinds` can be several only if each has markers"),
        ({"levels": 1001}, "`levels` must be an integer from 1 to 1000, got 1001"),
        ({"mode": "answer", "max_length": 21}, "`max_length` must be at least 22"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(tokenizer(), **options)


@pytest.mark.parametrize(
    ("tokens", "scores", "message"),
    [
        (
            torch.zeros(1, 2, dtype=torch.int64),
            torch.zeros(1, 600),
            r"`input_ids` must have at least `prompt_length` = 3 tokens, got \(1, 2\)",
        ),
        (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 20), "`scores` must cover the id"),
    ],
)
def test_wrong_calls(tokens: Tensor, scores: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(tokenizer())(tokens, scores)


def test_a_grid_of_locations_has_all_its_levels() -> None:
    with pytest.raises(ValueError, match="`levels` must be an integer from 1024 to 1024, got 1000"):
        processor(tokenizer(locations="kosmos"), levels=1000)
