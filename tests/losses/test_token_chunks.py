"""Losses in chunks of tokens equal losses computed at once."""

import math

import pytest
import torch

from vlparts.losses import _token_chunks
from vlparts.losses._token_chunks import chunked_losses

COUNTED = torch.tensor([True, False, True, True, False, True, True])
FACTORS = torch.arange(1.0, 8.0, dtype=torch.float64)


def row_losses(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return rows.logsumexp(1) * FACTORS[tokens].to(rows.dtype)


def logits_of(dtype: torch.dtype) -> torch.Tensor:
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    logits[~COUNTED] = math.nan
    return logits.requires_grad_()


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_give_losses_and_gradients_of_all_rows(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_token_chunks, "CHUNK_BYTES", rows * 4 * 5)
    logits = logits_of(dtype)
    wide = logits.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)[COUNTED].requires_grad_()
    expected = row_losses(wide, COUNTED.nonzero().squeeze(1))
    losses = chunked_losses(logits, COUNTED, row_losses)
    assert losses.dtype == wide.dtype
    assert not losses[~COUNTED].any()
    torch.testing.assert_close(losses[COUNTED], expected)
    upstream = torch.arange(7.0).to(losses)
    losses.backward(upstream)
    expected.backward(upstream[COUNTED])
    assert logits.grad is not None
    assert wide.grad is not None
    assert not logits.grad[~COUNTED].any()
    torch.testing.assert_close(logits.grad[COUNTED], wide.grad.to(dtype))


def test_no_chunk_is_larger_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_token_chunks, "CHUNK_BYTES", 2 * 4 * 5)
    seen = []

    def counting(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(rows.shape))
        return row_losses(rows, tokens)

    chunked_losses(logits_of(torch.bfloat16), COUNTED, counting).sum().backward()
    assert seen == [(2, 5), (2, 5), (1, 5)] * 2


def test_it_is_differentiable_once() -> None:
    logits = logits_of(torch.float64)
    loss = chunked_losses(logits, COUNTED, row_losses).sum()
    with pytest.raises(RuntimeError, match="Losses in chunks are differentiable once; got `create_graph=True`"):
        torch.autograd.grad(loss, logits, create_graph=True)
