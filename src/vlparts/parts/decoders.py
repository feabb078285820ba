"""Shared by the decoder-only language models: options of their configurations and inputs of their layers.

Shapes: B samples, S tokens per sample, H width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from .utils import check_finite, check_finite_number, check_minimum, check_token_inputs


def merge_rope_parameters(rope_parameters: dict[str, Any] | None, fields: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `rope_parameters` that holds the `rope_scaling` and `rope_theta` of a published configuration.

    Args:
        rope_parameters: The configuration's field, or None.
        fields: Further fields of the configuration; `rope_scaling`, which replaces `rope_parameters`, and `rope_theta`
            are removed from it.

    Raises:
        ValueError: If `rope_scaling` is not a dictionary, or `rope_theta` is given twice with different values.
    """
    parameters = fields.pop("rope_scaling", None) or rope_parameters or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"`rope_scaling` must be a dictionary, got {parameters!r}.")
    parameters = dict(parameters)  # transformers modifies it, but the caller's must not change
    theta = fields.pop("rope_theta", None)
    if theta is not None and parameters.setdefault("rope_theta", theta) != theta:
        raise ValueError(
            f"`rope_theta` must be that of `rope_parameters`, {parameters['rope_theta']}, if both are given, got "
            f"{theta}."
        )
    return parameters


def check_decoder_sizes(config: PreTrainedConfig) -> None:
    """Check the sizes that all decoders have.

    Raises:
        ValueError: If a size or `rope_theta` is not positive, `num_key_value_heads` does not divide
            `num_attention_heads`, `head_dim` is odd, or `rms_norm_eps` is negative.
    """
    check_minimum(config, 1, "vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "head_dim")
    check_minimum(config, 1, "max_position_embeddings")
    check_finite(config, "rms_norm_eps")
    check_finite_number("rope_theta", (config.rope_parameters or {}).get("rope_theta"), positive=True)
    check_minimum(config, 0, "num_hidden_layers")
    if config.num_attention_heads < 1 or config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"`num_attention_heads` must be a positive multiple of `num_key_value_heads`, got "
            f"{config.num_attention_heads} and {config.num_key_value_heads}."
        )
    if config.head_dim % 2:
        raise ValueError(f"`head_dim` must be even, got {config.head_dim}.")


class DecoderInputs(NamedTuple):
    """Inputs of a decoder's layers.

    Attributes:
        inputs_embeds: `(B, S, H)`.
        position_ids: As given; or `(1, S)`, the positions after the cache.
        past_key_values: The cache, or None without one.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    past_key_values: Cache | None


def prepare_decoder_inputs(
    embeddings: nn.Module,
    config: PreTrainedConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
    attention_mask: Any = None,
) -> DecoderInputs:
    """Embed tokens, create the cache and the default positions.

    Args:
        embeddings: From `(B, S)` int64 to `(B, S, H)`.
        config: Configuration for a new cache.
        input_ids: `(B, S)` int64, or None with `inputs_embeds`.
        inputs_embeds: `(B, S, H)`, or None with `input_ids`.
        position_ids: In any shape that the decoder takes; None for the positions after the cache.
        past_key_values: Cache with the keys and values of previous tokens.
        use_cache: Whether to create a cache if there is none.
        attention_mask: As given, for its check.

    Raises:
        ValueError: As [`check_token_inputs`].
    """
    check_token_inputs(
        input_ids,
        inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
    )
    if inputs_embeds is None:
        inputs_embeds = embeddings(input_ids)
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=config)
    if position_ids is None:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
    return DecoderInputs(inputs_embeds, position_ids, past_key_values)
