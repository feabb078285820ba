"""Pooling of tokens and masks of padding examples."""

import pytest
import torch

from vlparts.parts.dual_encoder_towers import blank_padding, example_mask, pool_tokens


@pytest.mark.parametrize("mask", [[[1, 1, 1, 0], [1, 0, 0, 0]], [[0, 1, 1, 1], [0, 0, 0, 1]], None])
def test_pooling_is_a_loop_over_texts(mask: list[list[int]] | None) -> None:
    hidden = torch.randn(2, 4, 3)
    attention_mask = None if mask is None else torch.tensor(mask)
    with_junk = hidden if mask is None else hidden.masked_fill(attention_mask.unsqueeze(-1) == 0, torch.nan)
    rows = [row[torch.tensor(kept).bool()] for row, kept in zip(hidden, mask or [[1] * 4] * 2, strict=True)]
    for pooling, pick in (("last", lambda r: r[-1]), ("first", lambda r: r[0]), ("mean", lambda r: r.mean(0))):
        expected = torch.stack([pick(row) for row in rows])
        torch.testing.assert_close(pool_tokens(with_junk, attention_mask, pooling), expected)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(2, 4\), got \(2, 3\)"):
        pool_tokens(torch.zeros(2, 4, 3), torch.ones(2, 3), "mean")


def test_real_examples_are_found_or_named() -> None:
    rows = torch.tensor([[1, 0], [0, 0], [-2, 0]])
    assert example_mask(None, rows, "mask", 3).tolist() == [True, False, True]
    named = torch.tensor([False, True, True])
    assert example_mask(named, rows, "mask", 3) is named
    assert example_mask(None, None, "mask", 3) is None
    assert example_mask(None, torch.ones(3, 1, 2, 2), "mask", 3) is None
    with pytest.raises(ValueError, match=r"`text_mask` must be bool with shape \(3,\), got torch.bool with \(2,\)"):
        example_mask(named[:2], rows, "text_mask", 3)


def test_padding_is_blank_and_gets_no_gradient() -> None:
    pooled = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]], requires_grad=True)
    blank = blank_padding(pooled, torch.tensor([True, False]))
    assert blank.tolist() == [[1, 2], [0, 0]]
    (blank * 3).sum().backward()
    assert pooled.grad.tolist() == [[3, 3], [0, 0]]
    assert blank_padding(pooled, None) is pooled
