"""The NaViT encoder: against a dense float64 version of itself, one image at a time, and its bad inputs."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from tests.parts.navit_oracle import oracle
from tests.tiny import navit, navit_config, packed_images
from vlparts import NaViTConfig, NaViTForImageClassification, NaViTModel

GRIDS = [(3, 5), (1, 1), (2, 7), (4, 4)]


def test_equals_a_loop_over_images_heads_and_patches_forward_and_backward() -> None:
    model = navit().double()
    patches, grids = packed_images(GRIDS, dtype=torch.float64)
    patches.requires_grad_()
    outputs = model(patches, grids)
    parameters = list(model.parameters())
    weights = torch.randn(outputs.last_hidden_state.shape, dtype=torch.float64)
    ours = (outputs.last_hidden_state * weights).sum() + outputs.pooler_output.pow(2).sum()
    our_gradients = torch.autograd.grad(ours, [patches, *parameters])

    expected = [oracle(model, part, *grid) for part, grid in zip(patches.split([15, 1, 14, 16]), GRIDS, strict=True)]
    hidden, pooled = torch.cat([one for one, _ in expected]), torch.stack([one for _, one in expected])
    torch.testing.assert_close(outputs.last_hidden_state, hidden)
    torch.testing.assert_close(outputs.pooler_output, pooled)
    gradients = torch.autograd.grad((hidden * weights).sum() + pooled.pow(2).sum(), [patches, *parameters])
    for mine, theirs in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("implementation", ["sdpa", "vlparts_packed", "eager"])
def test_attention_implementations_agree(implementation: str) -> None:
    model = navit()
    patches, grids = packed_images(GRIDS)
    expected = model(patches, grids)
    model.set_attn_implementation(implementation)
    outputs = model(patches, grids)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)


def test_eager_attention_weights_are_blocks() -> None:
    model = navit()
    model.set_attn_implementation("eager")
    patches, grids = packed_images([(2, 2), (1, 3)])
    outputs = model(patches, grids, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 2
    assert len(outputs.hidden_states) == 3
    weights = outputs.attentions[0][0, 0]
    assert torch.count_nonzero(weights[:4, 4:]) == 0
    assert torch.count_nonzero(weights[4:, :4]) == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))


def test_merge_order_changes_the_order_of_patches_and_nothing_else() -> None:
    from vlparts.parts.packed_index import merge_order

    model = navit()
    patches, grids = packed_images([(4, 6)])
    expected = model(patches, grids)
    model.config.spatial_merge_size = 2
    order = merge_order(4, 6, 2)
    outputs = model(patches[order], grids)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state[order])
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = navit().train()
    patches, grids = packed_images(GRIDS)
    model(patches, grids).pooler_output.pow(2).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(patches, grids).pooler_output.pow(2).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_bfloat16_is_near_float32() -> None:
    model = navit()
    patches, grids = packed_images(GRIDS)
    expected = model(patches, grids).last_hidden_state
    outputs = model.to(torch.bfloat16)(patches, grids).last_hidden_state
    assert outputs.dtype == torch.bfloat16
    assert (outputs.float() - expected).pow(2).mean().sqrt() < 0.05 * expected.pow(2).mean().sqrt()


def test_a_batch_without_images_is_empty() -> None:
    outputs = navit()(torch.zeros(0, 48), torch.zeros(0, 3, dtype=torch.int64))
    assert outputs.last_hidden_state.shape == (0, 32)
    assert outputs.pooler_output.shape == (0, 32)


@pytest.mark.parametrize(
    ("patches", "grids", "message"),
    [
        (torch.zeros(4, 47), [[1, 2, 2]], r"`pixel_values` must have shape \(patches, 48\), got \(4, 47\)"),
        (torch.zeros(5, 48), [[1, 2, 2]], "`image_grid_thw` describes 4 patches, but `pixel_values` holds 5"),
        (torch.zeros(4, 48), [[1, 0, 2]], r"`image_grid_thw\[0\]` must hold positive .*, got \[1, 0, 2\]"),
        (torch.zeros(4, 48), [[2, 2]], r"`image_grid_thw` must be an integer tensor of shape \(n, 3\), .* \(1, 2\)"),
    ],
)
def test_bad_input(patches: torch.Tensor, grids: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        navit()(patches, torch.tensor(grids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 30, "num_attention_heads": 4},
            "`num_attention_heads` must divide `hidden_size`, got 4 and 30",
        ),
        ({"patch_size": 0}, "`patch_size` must be at least 1, got 0"),
        ({"attention_dropout": 0.1}, "`attention_dropout` must be 0.0, got 0.1"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` must not be negative, got -1"),
        ({"position_coordinates": "polar"}, "'position_coordinates' expected one of .* got polar"),
        ({"pooling": "median"}, "'pooling' expected one of .* got median"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        (
            {"position_kind": "sinusoidal", "position_combination": "flat"},
            "`position_combination` must be one of .*'flat'",
        ),
        ({"rotary_theta": 0.0}, "`rotary_theta` must be a finite number above 0, got 0.0"),
        ({"rotary_theta": float("nan")}, "`rotary_theta` must be a finite number above 0, got nan"),
        ({"layer_norm_eps": -1.0}, "`layer_norm_eps` must be a finite number of at least 0, got -1.0"),
        ({"position_fourier_std": float("inf")}, "`position_fourier_std` must be a finite number of at least 0"),
        (
            {"rotary_theta": 10.0, "hidden_size": 36, "num_attention_heads": 6},
            "must be a multiple of 4 with `rotary_theta`, got 6",
        ),
        ({"max_frames": 0}, "`max_frames` must be at least 1 or None, got 0"),
        ({"num_register_tokens": -1}, "`num_register_tokens` must not be negative, got -1"),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        navit_config(**changes)


def parameters_of(config: NaViTConfig) -> int:
    """Number of parameters by formula."""
    width, mlp = config.hidden_size, config.intermediate_size
    head_dim = width // config.num_attention_heads
    block = 4 * width * width + 2 * head_dim + 2 * width * mlp + mlp + width + 2 * width
    patch = config.num_channels * config.patch_size**2 * width + width
    pool = width + 4 * (width * width + width) + 2 * width + 2 * width * mlp + mlp + width
    return config.num_hidden_layers * block + patch + 2 * config.max_grid_size * width + width + pool


@pytest.mark.parametrize(("name", "millions"), [("b32", 94.5), ("b16", 92.8), ("l16", 315.7)])
def test_variants_of_the_paper(name: str, millions: float) -> None:
    config = NaViTConfig.from_preset(name)
    with torch.device("meta"):
        model = NaViTModel(config)
    assert model.num_parameters() == parameters_of(config)
    assert round(model.num_parameters() / 1e6, 1) == millions
    assert config.patch_size == int(name[1:])


def test_presets() -> None:
    assert "b16" in NaViTConfig.presets()
    assert NaViTConfig.from_preset("tiny", patch_size=8).patch_size == 8
    with pytest.raises(ValueError, match="'huge'"):
        NaViTConfig.from_preset("huge")


def test_every_weight_is_initialised() -> None:
    model = NaViTModel(
        navit_config(
            initializer_range=0.5, position_initializer_range=3.0, num_register_tokens=8, max_frames=8, hidden_size=64
        )
    )
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if "position_embedding" in name:
            assert 2.4 < parameter.std() < 3.6, name
        elif parameter.ndim > 1 or name.endswith("probe"):
            assert 0.3 < parameter.std() < 0.7, name


def test_weights_that_a_checkpoint_lacks_are_initialised(tmp_path: object) -> None:
    """Loading builds the model on the meta device first; parameters that are not in the file must be initialized."""
    from safetensors.torch import load_file, save_file

    model = navit(initializer_range=0.5)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = ("embeddings.position_embedding.row", "pooling.probe", "layers.0.self_attn.qkv.weight")
    kept = {name: value for name, value in weights.items() if name not in missing}
    assert len(weights) - len(kept) == 3
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = NaViTModel.from_pretrained(tmp_path).state_dict()
    for name in missing:
        assert 0 < loaded[name].std() < 1, name
    for name, value in kept.items():
        assert torch.equal(loaded[name], value), name


def test_unknown_arguments_are_refused_and_those_of_every_model_taken() -> None:
    pixels, grid = packed_images([(2, 3)])
    for model in (navit(), NaViTForImageClassification(navit_config())):
        with pytest.raises(ValueError, match=r"`kwargs` must be among .*output_hidden_states.*, got max_seqlens, x;"):
            model(pixels, grid, max_seqlens=6, x=None)
        outputs = model(
            pixels, grid, output_hidden_states=True, return_dict=True, num_items_in_batch=1, use_cache=False
        )
        assert len(outputs.hidden_states) > 1
