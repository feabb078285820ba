"""Options and inputs that the decoders share; their models' tests cover the rest."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from vlparts.parts.decoders import merge_rope_parameters, prepare_decoder_inputs


def test_published_rotary_fields_are_merged_into_a_copy() -> None:
    own, fields = {"rope_type": "default"}, {"rope_theta": 5.0, "other": 1}
    assert merge_rope_parameters(own, fields) == {"rope_type": "default", "rope_theta": 5.0}
    assert own == {"rope_type": "default"}
    assert fields == {"other": 1}
    scaling = {"rope_type": "linear", "factor": 2.0}
    assert merge_rope_parameters(own, {"rope_scaling": scaling}) == scaling
    assert merge_rope_parameters(None, {}) == {}


def test_two_rotary_bases_must_agree() -> None:
    assert merge_rope_parameters({"rope_theta": 5.0}, {"rope_theta": 5.0}) == {"rope_theta": 5.0}
    with pytest.raises(ValueError, match="`rope_theta` must be that of `rope_parameters`, 4.0, .* got 5.0"):
        merge_rope_parameters({"rope_theta": 4.0}, {"rope_theta": 5.0})


def test_positions_continue_after_the_cache() -> None:
    config, embeddings = LlamaConfig(num_hidden_layers=1), nn.Embedding(10, 4)
    ids = torch.tensor([[1, 2, 3]])
    inputs = prepare_decoder_inputs(embeddings, config, ids, None, None, None, use_cache=True)
    assert inputs.position_ids.tolist() == [[0, 1, 2]]
    assert torch.equal(inputs.inputs_embeds, embeddings(ids))
    assert isinstance(inputs.past_key_values, DynamicCache)
    states = torch.zeros(1, 1, 3, 4)
    inputs.past_key_values.update(states, states, 0)
    following = prepare_decoder_inputs(embeddings, config, ids, None, None, inputs.past_key_values, use_cache=True)
    assert following.position_ids.tolist() == [[3, 4, 5]]
    assert following.past_key_values is inputs.past_key_values


def test_without_a_cache_none_is_made() -> None:
    embeds, positions = torch.randn(1, 2, 4), torch.tensor([[5, 6]])
    config = LlamaConfig(hidden_size=4, num_attention_heads=1)
    inputs = prepare_decoder_inputs(nn.Embedding(10, 4), config, None, embeds, positions, None, use_cache=False)
    assert inputs.past_key_values is None
    assert inputs.inputs_embeds is embeds
    assert inputs.position_ids is positions
