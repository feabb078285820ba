"""From the tokens of texts to one vector for each, and what padding examples become.

Shapes: B texts, S tokens of a text, D width, n examples (images or texts).
"""

import torch
from torch import Tensor

__all__ = ["blank_padding", "example_mask", "pool_tokens"]


def pool_tokens(hidden_states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """One vector for each text, wherever the padding stands.

    Args:
        hidden_states: `(B, S, D)`.
        attention_mask: `(B, S)`, 0 at padding; None if there is none.
        pooling: "last" or "first" token that is not padding, or the "mean" of those tokens.

    Returns:
        `(B, D)`. What a text of padding alone gives means nothing.

    Raises:
        ValueError: If the mask does not have the shape of the tokens.
    """
    batch, length, _ = hidden_states.shape
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(batch, length)
    if attention_mask.shape != (batch, length):
        raise ValueError(f"`attention_mask` must have shape {(batch, length)}, got {tuple(attention_mask.shape)}.")
    real = attention_mask.to(hidden_states.device).bool()
    if pooling == "mean":
        total = hidden_states.masked_fill(~real.unsqueeze(-1), 0.0).sum(1)
        return total / real.sum(1, keepdim=True).clamp(min=1).to(total.dtype)
    places = torch.arange(length, device=hidden_states.device).expand(batch, length)
    if pooling == "last":
        places = places.masked_fill(~real, 0).amax(1)
    else:
        places = places.masked_fill(~real, length - 1).amin(1)
    return hidden_states[torch.arange(batch, device=hidden_states.device), places]


def example_mask(mask: Tensor | None, inputs: Tensor | None, name: str, examples: int) -> Tensor | None:
    """Which examples are real and which are padding.

    Args:
        mask: `(n,)` bool, or None to look into `inputs`.
        inputs: `(n, anything)`, whose row is zeros for a padding example (the grids of images, the attention mask of
            texts). Anything else than a matrix tells nothing.
        name: Name of the mask, for the error message.
        examples: n.

    Returns:
        `(n,)` bool, or None if all are real.

    Raises:
        ValueError: If the mask has another type or shape.
    """
    if mask is None:
        return None if inputs is None or inputs.ndim != 2 else (inputs != 0).any(-1)
    if mask.dtype != torch.bool or mask.shape != (examples,):
        raise ValueError(f"`{name}` must be bool with shape ({examples},), got {mask.dtype} with {tuple(mask.shape)}.")
    return mask


def blank_padding(pooled: Tensor, mask: Tensor | None) -> Tensor:
    """`(n, D)` with zeros for padding examples, so that nothing of them reaches a gradient further on."""
    return pooled if mask is None else pooled.masked_fill(~mask.to(pooled.device).unsqueeze(-1), 0.0)
