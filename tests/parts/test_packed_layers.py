"""Prefix tokens: inserted in front of each segment, empty ones included, and recovered."""

import pytest
import torch

from vlparts.parts.packed_layers import PrefixTokens, get_prefix_layout, insert_unrotated


@pytest.mark.parametrize("lengths", [[3, 1, 4], [2, 0, 3, 0], [0], [5]])
@pytest.mark.parametrize("count", [1, 3])
def test_equal_to_joining_lists(lengths: list[int], count: int) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    patches = torch.randn(sum(lengths), 4, dtype=torch.float64)
    prefix = PrefixTokens(count, 4).double()
    torch.nn.init.normal_(prefix.tokens)
    layout = get_prefix_layout(cu_seqlens, len(patches), count)
    longer = prefix(patches, layout)
    expected = [piece for part in patches.split(lengths) for piece in (prefix.tokens, part)]
    assert torch.equal(longer, torch.cat(expected))
    assert layout.cu_seqlens.diff().tolist() == [length + count for length in lengths]
    assert torch.equal(longer[layout.patches], patches)
    assert torch.equal(longer[layout.prefix], prefix.tokens.expand(len(lengths), -1, -1))


def test_gradients_reach_patches_and_tokens() -> None:
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    patches = torch.randn(5, 4, requires_grad=True)
    prefix = PrefixTokens(2, 4)
    weights = torch.randn(9, 4)
    layout = get_prefix_layout(cu_seqlens, 5, 2)
    (prefix(patches, layout) * weights).sum().backward()
    assert torch.equal(patches.grad, weights[layout.patches])
    torch.testing.assert_close(prefix.tokens.grad, weights[layout.prefix].sum(0))


def test_prefix_tokens_are_not_rotated() -> None:
    layout = get_prefix_layout(torch.tensor([0, 1, 3], dtype=torch.int32), 3, 2)
    angles = torch.rand(3, 8)
    cos, sin = insert_unrotated((angles.cos(), angles.sin()), layout)
    assert torch.equal(cos[layout.patches], angles.cos())
    assert torch.equal(sin[layout.patches], angles.sin())
    assert (cos[layout.prefix] == 1).all()
    assert (sin[layout.prefix] == 0).all()
