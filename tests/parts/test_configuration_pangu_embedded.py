"""The presets of openPangu-Embedded, its published configurations, and what is refused."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from vlparts import PanguEmbeddedConfig, PanguEmbeddedForCausalLM

ROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}


def parameters_of(config: PanguEmbeddedConfig) -> int:
    """Counted by hand, without both embeddings."""
    width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = 2 * width * queries + queries + width + 2 * (width * keys + keys)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size + 2 * width) + width


@pytest.mark.parametrize("preset", ["pangu_embedded_7b", "openpangu_vl_7b"])
def test_the_published_size(preset: str) -> None:
    config = PanguEmbeddedConfig.from_preset(preset)
    with torch.device("meta"):
        model = PanguEmbeddedForCausalLM(config)
    embedding = model.lm_head.weight.numel()
    assert round(embedding / 1e6, 1) == 628.2
    inner = model.num_parameters() - 2 * embedding
    assert inner == parameters_of(config)
    assert round(inner / 1e9, 3) == 6.774


def test_presets_differ_in_positions() -> None:
    embedded, vision = (PanguEmbeddedConfig.from_preset(name) for name in ("pangu_embedded_7b", "openpangu_vl_7b"))
    assert (embedded.max_position_embeddings, vision.max_position_embeddings) == (32768, 131072)
    assert embedded.rope_parameters == {"rope_type": "default", "rope_theta": 16e6}
    sections = {"mrope_section": [10, 27, 27], "mrope_interleaved": True}
    assert vision.rope_parameters == {"rope_type": "default", "rope_theta": 64e6, **sections}
    vision.rope_parameters["rope_theta"] = 1.0
    assert PanguEmbeddedConfig.from_preset("openpangu_vl_7b").rope_parameters["rope_theta"] == 64e6
    assert PanguEmbeddedConfig.presets() == ("pangu_embedded_7b", "openpangu_vl_7b", "tiny", "tiny_mrope")


def test_a_published_configuration() -> None:
    scaling = {"rope_type": "default", "type": "default", "mrope_section": [10, 27, 27], "mrope_interleaved": True}
    published = {"bias": True, "rope_theta": 64000000.0, "rope_scaling": scaling, "max_position_embeddings": 131072}
    config = PanguEmbeddedConfig(**published)
    assert config.to_dict() == PanguEmbeddedConfig.from_preset("openpangu_vl_7b").to_dict()
    assert set(scaling) == {"rope_type", "type", "mrope_section", "mrope_interleaved"}
    assert not PanguEmbeddedConfig(bias=False).attention_bias
    qwen = {"type": "mrope", "mrope_section": [16, 24, 24]}
    assert PanguEmbeddedConfig(rope_scaling=qwen).rope_parameters["rope_type"] == "default"
    assert PanguEmbeddedConfig(rope_theta=5.0).rope_parameters == {"rope_type": "default", "rope_theta": 5.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 4]}},
            r"must sum to half of `head_dim`, 8, got",
        ),
        ({"rope_parameters": {**ROPE, "mrope_section": [4, 4]}}, "`mrope_section` must hold three integers"),
        ({"rope_parameters": {**ROPE, "mrope_interleaved": "yes"}}, "`mrope_interleaved` must be true or false"),
        (
            {"rope_parameters": ROPE, "rope_theta": 5.0},
            "`rope_theta` must be that of `rope_parameters`, 100.0.* got 5.0",
        ),
        ({"rope_scaling": [2, 3, 3]}, r"`rope_scaling` must be a dictionary, got \[2, 3, 3\]"),
        ({"num_key_value_heads": 3}, "`num_attention_heads` must be a positive multiple .* got 4 and 3"),
        ({"head_dim": 15}, "even rotary dimension, but got `head_dim`=15"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "`rope_theta` must be a finite number above 0, got -1.0"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "`rope_theta` must be a finite number above 0, got inf"),
        ({"max_position_embeddings": 0}, "`max_position_embeddings` must be at least 1, got 0"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, got 0"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` must be at least 0, got -1"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        PanguEmbeddedConfig.from_preset("tiny", **changes)


def test_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match="`name` must be one of pangu_embedded_7b, .* got 'huge'"):
        PanguEmbeddedConfig.from_preset("huge")
