"""What every decoder does before its first layer and after its last.

Shapes: B samples, S tokens of each, H width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache


class DecoderInputs(NamedTuple):
    """What a decoder's layers start from.

    Attributes:
        inputs_embeds: `(B, S, H)`.
        position_ids: As given; or `(1, S)`, the places after the cache.
        past_key_values: The cache, if there is one or one is to be filled.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    past_key_values: Cache | None


def prepare_decoder_inputs(
    embeddings: nn.Module,
    config: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
) -> DecoderInputs:
    """Embed tokens, make a cache if one is wanted, and count positions if none are given.

    Args:
        embeddings: From `(B, S)` int64 to `(B, S, H)`.
        config: The configuration that a new cache is for.
        input_ids: `(B, S)` int64, or None with `inputs_embeds`.
        inputs_embeds: `(B, S, H)`, or None with `input_ids`.
        position_ids: Of any form that the decoder takes; None for the places after the cache.
        past_key_values: Keys and values of the tokens before.
        use_cache: Whether to return keys and values.

    Raises:
        ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "both" if input_ids is not None else "none"
        raise ValueError(f"Exactly one of `input_ids` and `inputs_embeds` must be given, got {given}.")
    if inputs_embeds is None:
        inputs_embeds = embeddings(input_ids)
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=config)
    if position_ids is None:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
    return DecoderInputs(inputs_embeds, position_ids, past_key_values)


def kept_states(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The states `(B, kept, H)` that logits are wanted for.

    Args:
        hidden_states: `(B, S, H)`.
        logits_to_keep: The last so many places, 0 for all; or the places themselves.
    """
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[:, kept]
