"""What holds for the losses whatever the sizes."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.parts.test_dual_encoder_loss import LOSSES, chunked, gradients, inputs, plain

kinds = st.sampled_from(LOSSES)
seeds = st.integers(0, 2**16)


@given(kind=kinds, pairs=st.integers(1, 13), width=st.integers(1, 6), chunk_size=st.integers(1, 15), seed=seeds)
def test_the_chunk_size_does_not_matter(kind: str, pairs: int, width: int, chunk_size: int, seed: int) -> None:
    tensors = inputs(pairs, width, seed)
    loss, expected = chunked(kind, *tensors, chunk_size=chunk_size), plain(kind, *tensors)
    torch.testing.assert_close(loss, expected, atol=1e-11, rtol=1e-11)
    for got, wanted in zip(gradients(loss, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)


@given(kind=kinds, mask=st.lists(st.booleans(), min_size=1, max_size=12), chunk_size=st.integers(1, 6), seed=seeds)
def test_padding_pairs_do_not_matter(kind: str, mask: list[bool], chunk_size: int, seed: int) -> None:
    images, texts, scale, bias = inputs(len(mask), 4, seed)
    real = torch.tensor(mask)
    padded = chunked(kind, images, texts, scale, bias, chunk_size=chunk_size, pair_mask=real)
    alone = chunked(kind, images[real], texts[real], scale, bias, chunk_size=chunk_size)
    torch.testing.assert_close(padded, alone, atol=1e-12, rtol=1e-12)
    assert not torch.autograd.grad(padded, images)[0][~real].any()


@given(kind=kinds, pairs=st.integers(1, 12), chunk_size=st.integers(1, 6), seed=seeds)
def test_the_order_of_pairs_and_the_names_of_the_towers_do_not_matter(
    kind: str, pairs: int, chunk_size: int, seed: int
) -> None:
    images, texts, scale, bias = inputs(pairs, 4, seed)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    expected = chunked(kind, images, texts, scale, bias, chunk_size=chunk_size)
    shuffled = chunked(kind, images[order], texts[order], scale, bias, chunk_size=chunk_size)
    swapped = chunked(kind, texts, images, scale, bias, chunk_size=chunk_size)
    torch.testing.assert_close(shuffled, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(swapped, expected, atol=1e-11, rtol=1e-11)


@given(kind=kinds, pairs=st.integers(1, 9), seed=seeds)
def test_losses_are_not_negative(kind: str, pairs: int, seed: int) -> None:
    """Also of pairs that fit perfectly, in float32."""
    images, _, _, bias = inputs(pairs, 16, seed, torch.float32)
    images = torch.nn.functional.normalize(images, dim=-1)
    assert chunked(kind, images, images, 100.0, bias, chunk_size=4) >= 0
