"""Configuration of the dense language model of openPangu-Embedded and openPangu-VL."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

from .decoders import check_decoder_sizes, merge_rope_parameters
from .rope_multimodal import rotary_axes
from .utils import NamedPresets

_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
_PRESETS: dict[str, dict[str, Any]] = {
    "pangu_embedded_7b": {},
    "openpangu_vl_7b": {
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 64_000_000.0,
            "mrope_section": [10, 27, 27],
            "mrope_interleaved": True,
        },
    },
    "tiny": _TINY,
    "tiny_mrope": _TINY
    | {"rope_parameters": _TINY["rope_parameters"] | {"mrope_section": [2, 3, 3], "mrope_interleaved": True}},
}


@strict
class PanguEmbeddedConfig(NamedPresets, LlamaConfig):
    """Configuration of [`PanguEmbeddedModel`]: transformers' Llama with biases in all attention projections.

    The defaults are those of openPangu-Embedded-7B. Fields that are not listed here are those of `LlamaConfig`.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads; divides `num_attention_heads`.
        head_dim: Channels D of a head, even.
        max_position_embeddings: Longest sequence in tokens.
        rms_norm_eps: Epsilon of every normalisation.
        attention_bias: Whether the query, key, value and output projections have biases; published as "bias".
        pad_token_id: Id of padding, whose embedding is not trained.
        bos_token_id: Id of the beginning-of-sequence token.
        eos_token_id: Id of the end-of-sequence token.
        rope_parameters: "rope_type" and "rope_theta" as in transformers. With "mrope_section", the numbers of
            frequencies of time, rows and columns, positions have three axes; "mrope_interleaved" interleaves the axes
            over the frequencies, otherwise they follow one another as in Qwen2-VL; see [`rotary_axes`]. `rope_scaling`
            and `rope_theta` of a published configuration are accepted too.
    """

    model_type = "vlparts_pangu_embedded"
    named_presets = _PRESETS
    base_config_key = "text_config"
    attribute_map = {"bias": "attention_bias"}
    default_theta = 16_000_000.0
    ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved"}

    vocab_size: int = 153376
    hidden_size: int = 4096
    intermediate_size: int = 12800
    num_hidden_layers: int = 34
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    attention_bias: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 45892
    rope_parameters: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        parameters = merge_rope_parameters(self.rope_parameters, kwargs)
        rope_type = parameters.setdefault("rope_type", parameters.pop("type", "default"))
        if rope_type == "mrope":
            parameters["rope_type"] = "default"
        self.rope_parameters = parameters
        super().__post_init__(**kwargs)

    def validate_sizes(self) -> None:
        """Check that the sizes fit together; see [`check_decoder_sizes`]."""
        check_decoder_sizes(self)

    def validate_mrope(self) -> None:
        """Check the sections of multimodal rotary positions.

        Raises:
            ValueError: If "mrope_section" does not hold three counts that add up to half of `head_dim`, or
                "mrope_interleaved" is not a bool or is true without "mrope_section".
        """
        rotary_axes(self.rope_parameters or {}, self.head_dim // 2)


__all__ = ["PanguEmbeddedConfig"]
