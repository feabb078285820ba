"""Masked attention pooling on its own; the encoders' tests cover the rest."""

import torch

from tests.tiny import navit_config, order_one
from vlparts.parts.packed_pooling import MaskedAttentionPooling


def test_pooling_an_empty_image_gives_what_no_patches_give() -> None:
    pooling = order_one(MaskedAttentionPooling(navit_config())).eval()
    hidden = torch.randn(3, 32)
    pooled = pooling(hidden, torch.tensor([0, 3, 3], dtype=torch.int32), 3)
    other = pooling(hidden * 5, torch.tensor([0, 3, 3], dtype=torch.int32), 3)
    assert torch.isfinite(pooled).all()
    assert torch.equal(pooled[1], other[1])
    assert not torch.equal(pooled[0], other[0])
