"""The cache whose memory grows: it holds what transformers' `DynamicCache` holds, after any calls of its methods."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from tests.parts.test_moge import moge, tokens
from vlparts.parts.decoders import GrowingCacheLayer, use_growing_layers

CHANGES: dict[str, Callable[[Any], Any]] = {
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "crop": lambda layer: layer.crop(-3),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([0])),
    "reset": lambda layer: layer.reset(),
    "nothing": lambda layer: None,
}


def states(length: int, samples: int = 2) -> tuple[Tensor, Tensor]:
    """Keys of width 4 and values of width 3."""
    return torch.randn(samples, 3, length, 4), torch.randn(samples, 3, length, 3)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_a_dynamic_layer_holds(change: str) -> None:
    ours, theirs = GrowingCacheLayer(), DynamicLayer()
    samples = 2
    for turn, length in enumerate((5, 1, 1, 70, 1, 0, 200, 1, 1)):
        new = states(length, samples)
        kept = None if ours.keys is None else (ours.keys, ours.keys.clone())
        for mine, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        assert kept is None or torch.equal(*kept)  # an earlier tensor does not change
        if turn in (2, 4):
            for layer in (ours, theirs):
                CHANGES[change](layer)
            samples = 2 if ours.keys is None else len(ours.keys)


def test_a_token_is_written_behind_the_others() -> None:
    layer = GrowingCacheLayer()
    layer.update(*states(100))
    places = {layer.update(*states(1))[0].data_ptr() for _ in range(50)}
    assert len(places) == 1


def test_a_copy_is_independent() -> None:
    layer = GrowingCacheLayer()
    layer.update(*states(7))
    other, expected = copy.deepcopy(layer), layer.keys.clone()
    other.update(*states(1))
    other.keys.zero_()
    assert torch.equal(layer.keys, expected)


def test_gradients_reach_cached_states() -> None:
    layer, (keys, values) = GrowingCacheLayer(), states(4)
    layer.update(keys.requires_grad_(), values)
    found, _ = layer.update(*states(2))
    found.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_memory_of_inference_mode_is_left_with_it() -> None:
    layer = GrowingCacheLayer()
    with torch.inference_mode():
        layer.update(*states(4))
    with torch.no_grad():
        keys, _ = layer.update(*states(1))
    assert keys.shape[-2] == 5


def test_generation_uses_it_unless_a_cache_is_given() -> None:
    model, ids, given = moge().eval(), tokens(), DynamicCache()
    options = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    default, other = model.generate(ids, **options), model.generate(ids, past_key_values=given, **options)
    assert {type(layer) for layer in default.past_key_values.layers} == {GrowingCacheLayer}
    assert {type(layer) for layer in given.layers} == {DynamicLayer}
    assert torch.equal(default.sequences, other.sequences)
    torch.testing.assert_close(default.logits, other.logits)
    beams = {**options, "num_beams": 3}
    searched = model.generate(ids, **beams)
    assert torch.equal(searched.sequences, model.generate(ids, past_key_values=DynamicCache(), **beams).sequences)
    outputs = model(ids, use_cache=True)
    assert {type(layer) for layer in outputs.past_key_values.layers} == {GrowingCacheLayer}


def test_other_caches_are_not_changed() -> None:
    filled = DynamicCache()
    filled.update(*states(3), 0)
    use_growing_layers(filled)
    use_growing_layers(None)
    assert type(filled.layers[0]) is DynamicLayer
