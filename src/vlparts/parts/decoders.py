"""Shared by the decoder-only language models: options of their configurations, inputs of their layers, their cache.

Shapes: B samples, S tokens per sample, H width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig, GenerationMixin

from .utils import check_finite, check_finite_number, check_minimum, check_token_inputs

# Room of a cache for further tokens when it is moved: this part of its tokens, and at least so many.
CACHE_GROWTH = 0.25
CACHE_MIN_ROOM = 64


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
        use_growing_layers(past_key_values)
    if position_ids is None:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
    return DecoderInputs(inputs_embeds, position_ids, past_key_values)


class GrowingCacheLayer(DynamicLayer):
    """Keys and values of one layer in memory with room for more tokens.

    A `DynamicLayer` copies all keys and values for each new token; this one copies them when their memory is full,
    and writes a new token behind the others. Values, shapes and methods are the same; the tensors are slices of the
    memory.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start without tokens and without memory."""
        super().lazy_initialization(key_states, value_states)
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values `(B, heads, S, D)`, and return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._append("keys", key_states), self._append("values", value_states)
        self.keys, self.values = keys, values
        return keys, values

    def _append(self, name: str, new: Tensor) -> Tensor:
        held: Tensor = getattr(self, name)
        recorded = torch.is_grad_enabled() and (held.requires_grad or new.requires_grad)
        if recorded or torch.compiler.is_compiling():
            return torch.cat([held, new], dim=-2)
        past = held.shape[-2] if held.ndim == new.ndim else 0
        tokens = past + new.shape[-2]
        memory, filled = self._memory.get(name, (new, None))
        # Other methods replace the tensor. Memory made in inference mode cannot be written outside of it.
        usable = filled is held and memory.is_inference() == torch.is_inference_mode_enabled()
        if not usable or memory.shape[-2] < tokens:
            room = max(CACHE_MIN_ROOM, int(CACHE_GROWTH * tokens))
            memory = new.new_empty(*new.shape[:-2], tokens + room, new.shape[-1])
            if past:
                memory[..., :past, :] = held
        memory[..., past:tokens, :] = new
        filled = memory[..., :tokens, :]
        self._memory[name] = memory, filled
        return filled


class GrowingCacheGenerationMixin(GenerationMixin):
    """`GenerationMixin` whose default cache has [`GrowingCacheLayer`]s."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None:
            use_growing_layers(model_kwargs.get("past_key_values"))
        return result


def use_growing_layers(cache: Cache | None) -> None:
    """Replace the layers of an empty cache of transformers' default kind by [`GrowingCacheLayer`]s.

    Args:
        cache: Any cache; others, and those that are moved off the device, are not changed.
    """
    if type(cache) is DynamicCache and not cache.offloading and not cache.get_seq_length():
        cache.layers = [GrowingCacheLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
