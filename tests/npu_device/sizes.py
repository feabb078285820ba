"""Arguments of every kernel at sizes of published models, in bfloat16."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlparts import MoGEConfig
from vlparts.parts.modeling_moge import MoGEExperts
from vlparts_npu.experts_layout import arrange_expert_weights

# The vision tower of openPangu-VL-7B: 26 layers of width 1,280 with 16 heads of 80 channels.
TOKENS, WIDTH, HEADS, CHANNELS, INNER = 4784, 1280, 16, 80, 3456
SEGMENTS = 8
# A share of Pangu Pro MoE's layer of 64 experts.
EXPERTS, CHOSEN, EXPERT_WIDTH, EXPERT_INNER, EXPERT_TOKENS = 16, 2, 5120, 1344, 512


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, with gradients."""
    generator = torch.Generator().manual_seed(len(shape))
    return (scale * torch.randn(shape, generator=generator)).bfloat16().requires_grad_()


def attention() -> tuple[Any, ...]:
    """Attention inside the segments of a pack."""
    bounds = torch.linspace(0, TOKENS, SEGMENTS + 1).int()
    longest = int(bounds.diff().max())
    tensors = [random(TOKENS, HEADS, CHANNELS) for _ in range(3)]
    return *tensors, bounds, bounds, longest, longest, None, False


def angles() -> tuple[Tensor, Tensor]:
    """Cosines and sines."""
    found = torch.linspace(0, 99, TOKENS)[:, None] * torch.linspace(1, 0, CHANNELS // 2)
    return found.cos().repeat(1, 2), found.sin().repeat(1, 2)


def rotary_pair() -> tuple[Any, ...]:
    """Rotation of the queries and keys of a layer, parts of one projection."""
    query, key, _ = random(TOKENS, 3, HEADS, CHANNELS).detach().unbind(1)
    return query.requires_grad_(), key.requires_grad_(), *angles()


def experts() -> tuple[Any, ...]:
    """Routed experts, each token's drawn at random."""
    config = MoGEConfig(
        num_experts=EXPERTS,
        num_expert_groups=CHOSEN,
        num_experts_per_tok=CHOSEN,
        hidden_size=EXPERT_WIDTH,
        moe_intermediate_size=EXPERT_INNER,
    )
    module = MoGEExperts(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    arrange_expert_weights(module.bfloat16())
    scores = torch.rand(EXPERT_TOKENS, EXPERTS, generator=generator)
    weights, index = scores.topk(CHOSEN)
    return module, random(EXPERT_TOKENS, EXPERT_WIDTH), index, weights.bfloat16().requires_grad_()


REAL_SIZES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "npu_grouped": experts,
    "vlparts::gelu": lambda: (random(TOKENS, INNER),),
    "vlparts::packed_attention": attention,
    "vlparts::rms_norm": lambda: (random(TOKENS, WIDTH), random(WIDTH), 1e-6),
    "vlparts::rotary": lambda: (random(TOKENS, HEADS, CHANNELS), *angles()),
    "vlparts::rotary_pair": rotary_pair,
    "vlparts::swiglu": lambda: (random(TOKENS, 2 * INNER),),
}
