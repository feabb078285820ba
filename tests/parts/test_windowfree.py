"""The window-free encoder and its hybrid: against a dense float64 version, Qwen2.5-VL's tower, and bad inputs."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from tests.parts.windowfree_oracle import oracle
from tests.tiny import WINDOWED, order_one, packed_images, windowfree, windowfree_config
from vlparts import WindowFreeViTConfig, WindowFreeViTModel
from vlparts.parts import packed_segments
from vlparts.parts.image_pixels import normalize_raw_pixels
from vlparts.parts.packed_index import get_cu_seqlens, get_max_seqlen, get_position_ids
from vlparts.parts.packed_windows import get_windows, permute_blocks

GRIDS = [(1, 4, 4), (2, 6, 10), (1, 2, 2), (1, 10, 2)]
PATTERNS = {"full": {}, "hybrid": {"attention_pattern": WINDOWED}}
# A gate and two taps, as in other towers.
GATED = {"attention_pattern": WINDOWED, "gated_mlp": True, "hidden_act": "silu", "feature_layers": [-1, -3]}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def raw_pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 48), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("changes", [*PATTERNS.values(), GATED], ids=[*PATTERNS, "gated"])
def test_equals_a_dense_loop_over_frames_and_heads_forward_and_backward(changes: dict[str, Any]) -> None:
    model = windowfree(**{"feature_layers": [0, -1, -3], **changes}).double()
    pixels, grids = packed_images(GRIDS, dtype=torch.float64)
    pixels.requires_grad_()
    parameters = list(model.parameters())
    weights = torch.randn(2, len(pixels), 32, dtype=torch.float64)
    found = model(pixels, grids)
    layers = oracle(model, pixels, GRIDS)
    torch.testing.assert_close(found.last_hidden_state, layers[-1], atol=1e-5, rtol=1e-5)
    for index, feature_map in zip(model.config.feature_layers, found.feature_maps, strict=True):
        torch.testing.assert_close(feature_map, layers[index], atol=1e-5, rtol=1e-5)
    ours = (found.feature_maps[0] * weights[0] + found.feature_maps[-1] * weights[1]).sum()
    taps = [layers[model.config.feature_layers[i]] for i in (0, -1)]
    theirs = (taps[0] * weights[0] + taps[1] * weights[1]).sum()
    ours = torch.autograd.grad(ours, [pixels, *parameters], allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(theirs, [pixels, *parameters], allow_unused=True, materialize_grads=True)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def from_native(native: torch.nn.Module) -> dict[str, Tensor]:
    """Qwen2.5-VL's weights under the names of this encoder, whose final norm is the merger's."""
    names = {"blocks.": "layers.", ".attn.qkv": ".self_attn.qkv", ".attn.proj": ".self_attn.o_proj"}
    names |= {"patch_embed.proj": "patch_embedding.projection", "merger.ln_q": "norm"}
    weights = {}
    for name, tensor in native.state_dict().items():
        if name.startswith("merger.mlp"):
            continue
        for theirs, mine in names.items():
            name = name.replace(theirs, mine)
        weights[name] = tensor.flatten(1) if name.startswith("patch_embedding") else tensor
    return weights


@pytest.mark.parametrize("full_layers", [[1, 3], [0, 1, 2, 3], []], ids=str)
def test_equals_the_native_tower_of_qwen2_5_vl(full_layers: list[int]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    config = Qwen2_5_VLVisionConfig(
        depth=4, num_heads=4, fullatt_block_indexes=full_layers, patch_size=4, window_size=16, **sizes
    )
    native = order_one(Qwen2_5_VisionTransformerPretrainedModel(config)).eval()
    pattern = {"window_size": 16, "full_attention_layers": full_layers}
    model = windowfree(num_attention_heads=4, **sizes, **{**GATED, "attention_pattern": pattern})
    model.load_state_dict(from_native(native))
    grids = torch.tensor(GRIDS)
    pixels = torch.randn(int(grids.prod(-1).sum()), 96)  # two different frames in every patch
    with torch.no_grad():
        hidden = native(pixels, grids).last_hidden_state  # in the order of the windows, before the merger's norm
        expected = permute_blocks(native.merger.ln_q(hidden), get_windows(grids, 2, 2).inverse)
        torch.testing.assert_close(model(pixels, grids).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_windows_matter_and_are_left_out_by_full_attention() -> None:
    pixels, grids = packed_images([(1, 8, 8)])
    hybrid, full = windowfree(attention_pattern=WINDOWED), windowfree()
    every = windowfree(attention_pattern={"window_size": 16, "full_attention_layers": [0, 1, 2, 3]})
    assert not torch.allclose(hybrid(pixels, grids).last_hidden_state, full(pixels, grids).last_hidden_state)
    torch.testing.assert_close(
        every(pixels, grids).last_hidden_state, full(pixels, grids).last_hidden_state, atol=1e-5, rtol=1e-5
    )


@every_pattern
@pytest.mark.parametrize("implementation", ["sdpa", "vlparts_packed", "eager"])
def test_attention_implementations_agree(pattern: str, implementation: str) -> None:
    model = windowfree(**PATTERNS[pattern])
    pixels, grids = packed_images(GRIDS)
    expected = model(pixels, grids).last_hidden_state
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(pixels, grids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_eager_attention_weights_are_windows() -> None:
    model = windowfree(attention_pattern=WINDOWED)
    model.set_attn_implementation("eager")
    pixels, grids = packed_images([(1, 4, 6)])
    weights = [one[0, 0] for one in model(pixels, grids, output_attentions=True).attentions]
    assert len(weights) == 4
    for index, of_layer in enumerate(weights):
        torch.testing.assert_close(of_layer.sum(-1), torch.ones(24))
        crossing = torch.count_nonzero(of_layer[:16, 16:]) + torch.count_nonzero(of_layer[16:, :16])
        assert (crossing == 0) == (index in (0, 2))


@every_pattern
def test_raw_pixels_are_normalised_once(pattern: str) -> None:
    model = windowfree(**PATTERNS[pattern])
    grids = torch.tensor(GRIDS)
    raw = raw_pixels(int(grids.prod(-1).sum()))
    normalised = normalize_raw_pixels(raw, model.config.image_mean, model.config.image_std)
    expected = model(normalised, grids).last_hidden_state
    torch.testing.assert_close(model(raw, grids).last_hidden_state, expected, atol=1e-6, rtol=1e-6)
    assert model.bfloat16()(raw, grids).last_hidden_state.dtype == torch.bfloat16


def test_a_patch_of_one_frame_is_that_frame_twice() -> None:
    model, (pixels, grids) = windowfree(), packed_images(GRIDS)
    twice = pixels.view(-1, 3, 1, 16).repeat(1, 1, 2, 1).flatten(1)
    assert torch.equal(model(pixels, grids).last_hidden_state, model(twice, grids).last_hidden_state)


def test_hidden_states_are_found_through_patch_index() -> None:
    for changes in PATTERNS.values():
        model = windowfree(**changes)
        pixels, grids = packed_images(GRIDS)
        outputs = model(pixels, grids, output_hidden_states=True)
        assert len(outputs.hidden_states) == 5
        last = outputs.hidden_states[-1]
        last = last if outputs.patch_index is None else last[outputs.patch_index]
        torch.testing.assert_close(model.norm(last), outputs.last_hidden_state, atol=1e-6, rtol=1e-6)


@every_pattern
def test_what_is_computed_beforehand_changes_nothing(pattern: str) -> None:
    model, (pixels, grids) = windowfree(**PATTERNS[pattern]), packed_images(GRIDS)
    cu_seqlens, windows = get_cu_seqlens(grids), get_windows(grids, 2, 2)
    found = model(
        pixels,
        grids,
        cu_seqlens=cu_seqlens,
        max_seqlen=get_max_seqlen(cu_seqlens),
        position_ids=get_position_ids(grids, 2),
        window_index=windows.order,
        cu_window_seqlens=windows.cu_seqlens,
    )
    assert torch.equal(found.last_hidden_state, model(pixels, grids).last_hidden_state)


@every_pattern
def test_passes_and_chunks_of_the_mlp_change_nothing(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (pixels, grids) = windowfree(**PATTERNS[pattern]), packed_images(GRIDS)
    outcomes = []
    for limit in (0, 7):  # one pass; seven tokens per pass and chunk
        monkeypatch.setattr(packed_segments, "tokens_per_pass", lambda hidden_states, width, limit=limit: limit)
        model.zero_grad()
        hidden = model(pixels, grids).last_hidden_state
        hidden.pow(2).mean().backward()
        outcomes.append([hidden.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(*outcomes, atol=1e-5, rtol=1e-4)


def test_mean_pooling() -> None:
    model, (pixels, grids) = windowfree(pooling="mean"), packed_images(GRIDS)
    outputs = model(pixels, grids)
    for pooled, part in zip(
        outputs.pooler_output, outputs.last_hidden_state.split(grids.prod(-1).tolist()), strict=True
    ):
        torch.testing.assert_close(pooled, part.mean(0), atol=1e-5, rtol=1e-5)
    assert windowfree()(pixels, grids).pooler_output is None


@every_pattern
def test_gradient_checkpointing_changes_no_gradient(pattern: str) -> None:
    model, (pixels, grids) = windowfree(**PATTERNS[pattern]).train(), packed_images(GRIDS)
    gradients = []
    for turn in range(2):
        if turn:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(pixels, grids).last_hidden_state.pow(2).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@every_pattern
def test_bfloat16_is_near_float32(pattern: str) -> None:
    model, (pixels, grids) = windowfree(**PATTERNS[pattern]), packed_images(GRIDS)
    expected = model(pixels, grids).last_hidden_state
    found = model.bfloat16()(pixels, grids).last_hidden_state
    assert (found.float() - expected).pow(2).mean().sqrt() < 0.05 * expected.pow(2).mean().sqrt()


@pytest.mark.parametrize(
    ("pixels", "grids", "message"),
    [
        (torch.zeros(6, 48), [[1, 2, 3]], "3 columns, which spatial_merge_size=2 does not divide"),
        (torch.zeros(4, 48), [[1, 2, 4]], "describes 8 patches, but `pixel_values` holds 4"),
        (torch.zeros(4, 47), [[1, 2, 2]], r"`pixel_values` must have shape \(patches, 48\) or \(patches, 96\), got"),
        (torch.zeros(4, 48) + 255, [[1, 2, 2]], "`pixel_values`.*raw"),
        (torch.zeros(4, 48, dtype=torch.int64), [[1, 2, 2]], "`pixel_values`.*int64"),
        (torch.zeros(4, 48), [[1.0, 2, 2]], "`image_grid_thw` must be an integer tensor"),
    ],
    ids=["not divisible", "count", "width", "raw floats", "integers", "float grid"],
)
@every_pattern
def test_bad_input(pixels: Tensor, grids: list[list[int]], message: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=message):
        windowfree(**PATTERNS[pattern])(pixels, torch.tensor(grids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_pattern": {"window_size": 20, "full_attention_layers": []}}, "positive multiple of 8 pixels"),
        ({"attention_pattern": {"window_size": 0, "full_attention_layers": []}}, "positive multiple of 8 pixels"),
        ({"attention_pattern": {"window_size": 16, "full_attention_layers": [4]}}, "layers from 0 to 3, got .4."),
        ({"attention_pattern": {"window_size": 16}}, "the keys 'window_size' and 'full_attention_layers'"),
        ({"attention_pattern": "windows"}, "'attention_pattern' with value 'windows'"),
        ({"feature_layers": [-1, 4]}, "`feature_layers` must name layers from -4 to 3, got .-1, 4."),
        ({"feature_layers": [-1, 3]}, "`feature_layers` must name each layer once"),
        ({"feature_layers": []}, "`feature_layers` must name layers"),
        ({"num_attention_heads": 16}, "heads of a multiple of 4 channels, got 16 and 32"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0"),
        ({"attention_dropout": 0.1}, "`attention_dropout` must be 0.0, got 0.1"),
        ({"rotary_theta": 0.0}, "`rotary_theta` must be a finite number above 0, got 0.0"),
        ({"rotary_theta": float("inf")}, "`rotary_theta` must be a finite number above 0, got inf"),
        ({"rms_norm_eps": -1e-6}, "`rms_norm_eps` must be a finite number of at least 0, got -1e-06"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "`image_mean` must be a finite number, got nan"),
        ({"image_mean": [0.5]}, "`image_mean` must have one value per channel, 3, got"),
        ({"image_std": [0.5, 0.0, 0.5]}, "`image_std` must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_configuration(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        windowfree_config(**changes)


@pytest.mark.parametrize("name", ["window_free_600m", "openpangu_vl_vit"])
def test_parameters_of_the_published_size(name: str) -> None:
    with torch.device("meta"):
        model = WindowFreeViTModel(WindowFreeViTConfig.from_preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == 615_624_192


def test_presets() -> None:
    for name in WindowFreeViTConfig.presets():
        config = WindowFreeViTConfig.from_preset(name)
        windowed = sum(config.has_windows(layer) for layer in range(config.num_hidden_layers))
        assert windowed == {"openpangu_vl_vit": 22, "hybrid_tiny": 2, "qwen2_5_vl_vit": 28}.get(name, 0)
        assert (windowed == 0) == (config.attention_pattern == "full")
        assert WindowFreeViTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="`name` must be one of window_free_600m"):
        WindowFreeViTConfig.from_preset("huge")


def test_every_weight_is_initialised(tmp_path: Any) -> None:
    with torch.device("meta"):
        model = WindowFreeViTModel(windowfree_config())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights()
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    assert all(bool((layer.norm1.weight == 1).all()) for layer in model.layers)


def test_unknown_arguments_are_refused_and_those_of_every_model_taken() -> None:
    pixels, grid = packed_images([(2, 4)])
    with pytest.raises(ValueError, match=r"`kwargs` must be among .*output_hidden_states.*, got keep_index;"):
        windowfree()(pixels, grid, keep_index=None)
    assert len(windowfree()(pixels, grid, output_hidden_states=True, return_dict=True).hidden_states) > 1
