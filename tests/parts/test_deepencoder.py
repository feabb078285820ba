"""DeepSeek-OCR's encoder: packing, options, counts, and bad inputs; parity stands in `tests/parity`."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from tests.tiny import order_one
from vlparts import DeepEncoderConfig, DeepEncoderModel
from vlparts.parts import modeling_deepencoder

GRIDS = [(1, 8, 8), (1, 4, 12), (1, 8, 8), (1, 4, 4)]


def small(**changes: Any) -> DeepEncoderModel:
    return order_one(DeepEncoderModel(DeepEncoderConfig.from_preset("deepencoder_tiny", **changes)).eval())


def views(grids: list[tuple[int, int, int]] = GRIDS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    pixels = torch.rand(sum(height * width for _, height, width in grids), 768, dtype=dtype) * 2 - 1
    return pixels, torch.tensor(grids)


def test_published_parameters() -> None:
    with torch.device("meta"):
        model = DeepEncoderModel(DeepEncoderConfig.from_preset("deepseek_ocr", clip_patch_embedding=14))
    assert sum(parameter.numel() for parameter in model.sam.parameters()) == 95_569_152
    assert sum(parameter.numel() for parameter in model.clip.parameters()) == 302_575_616
    assert model.clip.unused_patch_embedding.numel() == 602_112
    assert model.config.hidden_size == 2048


@pytest.mark.parametrize("attention", ["eager", "sdpa", "vlparts_packed"])
def test_a_view_is_encoded_as_if_it_were_alone(attention: str) -> None:
    model = small(feature_layers=[0, -1]).double()
    model.set_attn_implementation(attention)
    pixels, grids = views()
    together = model(pixels, grids)
    lengths = [height * width for _, height, width in GRIDS]
    alone = [model(part, grid[None]) for part, grid in zip(pixels.split(lengths), grids, strict=True)]
    for name in ("last_hidden_state", "tokens_per_image"):
        torch.testing.assert_close(together[name], torch.cat([one[name] for one in alone]))
    for layer, feature_map in enumerate(together.feature_maps):
        torch.testing.assert_close(feature_map, torch.cat([one.feature_maps[layer] for one in alone]))
    assert together.tokens_per_image.tolist() == [2 * 3 + 1, 1 * 4 + 1, 2 * 3 + 1, 1 * 2 + 1]


def test_no_gradient_crosses_between_views() -> None:
    model = small().double()
    pixels, grids = views()
    pixels.requires_grad_()
    tokens = model(pixels, grids).last_hidden_state
    (gradient,) = torch.autograd.grad(tokens[4:7].square().sum(), pixels)
    assert (gradient[64:112].abs().sum(-1) > 0).all()
    assert gradient[:64].abs().sum() == gradient[112:].abs().sum() == 0


def test_attentions_are_the_softmax_of_each_layer_of_clip_size_after_size() -> None:
    model = small().double()
    model.set_attn_implementation("eager")
    pixels, grids = views()
    inputs: list[Tensor] = []
    for layer in model.clip.layers:
        layer.self_attn.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    output = model(pixels, grids, output_attentions=True)
    # Of each size (8 x 8, 4 x 12, 4 x 4 patches) the two layers: views, heads, class token and tokens.
    assert [weights.shape for weights in output.attentions] == [(2, 4, 5, 5)] * 2 + [(1, 4, 4, 4)] * 2 + [
        (1, 4, 2, 2)
    ] * 2
    for index, (weights, given) in enumerate(zip(output.attentions, inputs, strict=True)):
        qkv = model.clip.layers[index % 2].self_attn.qkv(given).unflatten(-1, (3, 4, 12))
        scores = torch.einsum("nqhd,nkhd->nhqk", qkv[:, :, 0], qkv[:, :, 1]) / 12**0.5
        torch.testing.assert_close(weights, scores.softmax(-1))
    assert model(pixels, grids).attentions is None
    weights = model(pixels, grids, output_attentions=True, return_dict=False)[-1]
    assert all(torch.equal(*pair) for pair in zip(weights, output.attentions, strict=True))


def test_hidden_states_and_feature_layers_count_from_both_ends() -> None:
    model = small(feature_layers=[0, 1, -1, -2]).double()
    pixels, grids = views()
    outputs = model(pixels, grids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    states = outputs.hidden_states
    expected = (states[1], states[2], states[2], states[1])
    for feature_map, state in zip(outputs.feature_maps, expected, strict=True):
        torch.testing.assert_close(feature_map, state, rtol=0, atol=0)
    torch.testing.assert_close(outputs.last_hidden_state, states[-1], rtol=0, atol=0)
    assert model(pixels, grids).hidden_states is None
    assert not torch.equal(states[0], states[1])


def test_gradient_checkpointing_changes_nothing() -> None:
    model = small().double()
    pixels, grids = views()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(pixels, grids).last_hidden_state.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.train()
    model.gradient_checkpointing_enable()
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert wanted.abs().sum() > 0


def test_bfloat16_is_near() -> None:
    model = small()
    pixels, grids = views(dtype=torch.float32)
    expected = model(pixels, grids).last_hidden_state
    found = model.bfloat16()(pixels, grids).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_relative_attention_makes_no_bias_of_all_pairs_of_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_deepencoder, "tokens_per_pass", lambda tokens, width: 0)
    monkeypatch.setattr(modeling_deepencoder, "MAX_SCORES", 2**16)
    model = small(sam_global_layers=[0, 1])
    pixels, grids = views([(1, 32, 32)], torch.float32)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in torch.utils._pytree.tree_leaves(output) if isinstance(one, Tensor))
            return output

    with Sizes():
        model(pixels, grids).last_hidden_state.sum().backward()
    assert sizes
    assert max(sizes) < 1024**2  # patches x patches of one head


@pytest.mark.parametrize("queries", [7, 50, 64, 150])
def test_chunks_of_relative_attention_change_nothing(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    model = small().double()
    pixels, grids = views([(1, 8, 8)] * 2)

    def results() -> list[Tensor]:
        model.zero_grad()
        tokens = model(pixels, grids).last_hidden_state
        tokens.square().sum().backward()
        return [tokens.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    monkeypatch.setattr(modeling_deepencoder, "tokens_per_pass", lambda tokens, width: 0)
    expected = results()
    monkeypatch.setattr(modeling_deepencoder, "tokens_per_pass", lambda tokens, width: queries)
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_compiled_with_sizes_from_the_host() -> None:
    model = small().double()
    pixels, grids = views()
    expected = model(pixels, grids).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = compiled(pixels, grids, grid_cpu=GRIDS).last_hidden_state
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("pixels", "grids", "message"),
    [
        (torch.zeros(64, 767), [(1, 8, 8)], r"`pixel_values` must have shape \(any, 768\), got \(64, 767\)"),
        (torch.zeros(64, 768), [(1, 8, 4)], "describes 32 patches, but `pixel_values` holds 64"),
        (torch.zeros(24, 768), [(1, 6, 4)], r"has 6 rows and 4 columns, which spatial_merge_size=4 does not divide"),
        (torch.zeros(128, 768), [(2, 8, 8)], r"`image_grid_thw` must have 1 frame in each row, got \[\[2, 8, 8\]\]"),
        (
            torch.zeros(64, 768, dtype=torch.uint8),
            [(1, 8, 8)],
            "must be normalized floating-point pixels, got torch.uint8",
        ),
        (torch.full((64, 768), 255.0), [(1, 8, 8)], "expected normalized pixels"),
    ],
)
def test_bad_inputs(pixels: Tensor, grids: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(pixels, torch.tensor(grids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sam_num_attention_heads": 5}, "`sam_num_attention_heads` must divide `sam_hidden_size`, got 5 and 768"),
        ({"clip_num_attention_heads": 5}, "`clip_num_attention_heads` must divide"),
        ({"compressor_channels": [512, 512]}, r"the second `clip_hidden_size` \(1024\), got \[512, 512\]"),
        ({"sam_global_layers": [12]}, r"`sam_global_layers` must be between 0 and 11, got \[12\]"),
        ({"feature_layers": []}, "`feature_layers` must hold at least one layer"),
        ({"sam_window_size": 0}, "`sam_window_size` must be at least 1, got 0"),
        ({"clip_patch_embedding": 0}, "`clip_patch_embedding` must be at least 1, got 0"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        DeepEncoderConfig(**changes)
