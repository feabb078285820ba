"""Importance of samples: by record, by task, by length."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlparts.losses.sample_weights import (
    importance_by_length,
    importance_by_record,
    importance_by_task,
    root_length_importance,
    root_subsegments_importance,
)
from vlparts.losses.weights import weigh_tokens

LABELS = torch.tensor([[1, 2, 3, 4], [-100, 5, -100, -100], [-100, -100, -100, -100], [6, 7, -100, 8]])


def test_records_state_their_importance() -> None:
    records = [{"weight": 2}, {"weight": 0.0, "text": "a"}, {}]
    assert importance_by_record(records[:2], "weight").tolist() == [2, 0]
    assert importance_by_record(records, "weight", default=0.5).tolist() == [2, 0, 0.5]
    assert importance_by_record([], "weight").shape == (0,)


def test_tasks_have_an_importance() -> None:
    weights = {"caption": 0.1, "pointing": 0.2}
    found = importance_by_task(["pointing", "caption", "pointing"], weights)
    torch.testing.assert_close(found, torch.tensor([0.2, 0.1, 0.2]))
    assert importance_by_task(["other"], weights, default=1).tolist() == [1]
    assert importance_by_task(["other"], {}, default=0).tolist() == [0]


@given(exponent=st.floats(0, 3), seed=st.integers(0, 100))
def test_length_is_the_sum_of_token_weights(exponent: float, seed: int) -> None:
    token_weights = torch.rand(LABELS.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    expected = []
    for row, of_row in zip(LABELS.tolist(), token_weights.tolist(), strict=True):
        size = sum(weight for label, weight in zip(row, of_row, strict=True) if label != -100)
        expected.append(size**-exponent if size else 0.0)
    found = importance_by_length(LABELS, exponent, token_weights=token_weights, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_lengths_of_packed_samples() -> None:
    found = importance_by_length(LABELS.flatten(), 1, cu_seqlens=torch.tensor([0, 3, 6, 16]))
    torch.testing.assert_close(found, torch.tensor([1 / 3, 1 / 2, 1 / 3]))


def test_root_length_is_molmo2s() -> None:
    torch.testing.assert_close(root_length_importance(LABELS), torch.tensor([1, 2, 0, 2 / math.sqrt(3)]))
    torch.testing.assert_close(root_length_importance(LABELS, 4), torch.tensor([2, 4, 0, 4 / math.sqrt(3)]))


def test_root_length_with_token_averaging_is_square_averaging() -> None:
    importance = root_length_importance(LABELS, dtype=torch.float64)
    found = weigh_tokens(LABELS, preset="token", sample_weights=importance, dtype=torch.float64).weights
    square = weigh_tokens(LABELS, preset="square", dtype=torch.float64).weights
    torch.testing.assert_close(found, square)


def test_root_subsegments_is_molmo2s() -> None:
    torch.testing.assert_close(root_subsegments_importance(torch.tensor([1, 4, 9])), torch.tensor([1, 1 / 2, 1 / 3]))


@pytest.mark.parametrize(
    ("records", "default", "message"),
    [
        ([{"weight": 1}, {"text": "a"}], None, r"`records\[1\]` must have the field 'weight', got text"),
        ([{"weight": "1"}], None, r"`records\[0\]\['weight'\]` must be a finite number of at least 0, got '1'"),
        ([{"weight": -1}], None, r"`records\[0\]\['weight'\]` must be a finite number of at least 0, got -1"),
        ([{"weight": None}], 1, r"`records\[0\]\['weight'\]` must be a finite number of at least 0, got None"),
        ([{}], math.nan, "`default` must be a finite number of at least 0, got nan"),
    ],
)
def test_bad_records_are_refused(records: list[dict[str, Any]], default: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance_by_record(records, "weight", default)


def test_bad_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`tasks\[1\]` must be one of caption, pointing, got 'vqa'"):
        importance_by_task(["caption", "vqa"], {"caption": 1, "pointing": 1})
    with pytest.raises(ValueError, match=r"`weights\['vqa'\]` must be a finite number of at least 0, got True"):
        importance_by_task(["vqa"], {"vqa": True})
    with pytest.raises(ValueError, match="`default` must be a finite number of at least 0, got -1"):
        importance_by_task([], {}, default=-1)


def test_bad_lengths_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="`exponent` must be a finite number of at least 0, got -1"):
        importance_by_length(LABELS, -1)
    with pytest.raises(ValueError, match="`factor` must be a finite number of at least 0, got inf"):
        root_length_importance(LABELS, math.inf)
    with pytest.raises(ValueError, match="`counts` must be at least 1, got 0"):
        root_subsegments_importance(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"`counts` must be integers \(n,\), got torch.float32 \(2,\)"):
        root_subsegments_importance(torch.ones(2))
