"""The NaViT encoder: against a dense float64 version of itself, one image at a time, and its bad inputs."""

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import navit, navit_config, packed_images
from vlparts import NaViTConfig, NaViTModel

GRIDS = [(3, 5), (1, 1), (2, 7), (4, 4)]


def layer_norm(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + norm.eps)
    return normed * norm.weight + (0 if norm.bias is None else norm.bias)


def oracle(model: NaViTModel, patches: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One image, loops and explicit softmax, with the model's weights."""
    config = model.config
    tables = model.embeddings.position_embedding
    positions = []
    for y in range(rows):
        for x in range(columns):
            total = 0
            for table, place, size in ((tables.row, y, rows), (tables.column, x, columns)):
                n = table.shape[0]
                at = min(max((place + 0.5) * n / size - 0.5, 0), n - 1)
                low = int(at)
                high = min(low + 1, n - 1)
                total = total + table[low] * (1 - (at - low)) + table[high] * (at - low)
            positions.append(total)
    hidden = model.embeddings.patch_embedding(patches) + torch.stack(positions)
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for layer in model.layers:
        qkv = layer.self_attn.qkv(layer_norm(hidden, layer.norm1))
        query, key, value = qkv.split(config.hidden_size, -1)
        outputs = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            q, k = (
                layer_norm(query[:, part], layer.self_attn.q_norm),
                layer_norm(key[:, part], layer.self_attn.k_norm),
            )
            outputs.append(torch.softmax(q @ k.T / width**0.5, -1) @ value[:, part])
        hidden = hidden + layer.self_attn.o_proj(torch.cat(outputs, -1))
        hidden = hidden + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer_norm(hidden, layer.norm2))))
    hidden = layer_norm(hidden, model.norm)
    pool = model.pooling
    query, key, value = pool.q_proj(pool.probe), pool.k_proj(hidden), pool.v_proj(hidden)
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        outputs.append(torch.softmax(key[:, part] @ query[part] / width**0.5, 0) @ value[:, part])
    pooled = pool.o_proj(torch.cat(outputs))
    return hidden, pooled + pool.fc2(F.gelu(pool.fc1(layer_norm(pooled, pool.norm))))


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


def test_frames_of_a_video_are_encoded_one_by_one_and_pooled_together() -> None:
    model = navit()
    patches, grids = packed_images([(3, 2, 2), (1, 5)])
    outputs = model(patches, grids)
    alone = model(patches[:12], torch.tensor([[1, 2, 2]] * 3))
    torch.testing.assert_close(outputs.last_hidden_state[:12], alone.last_hidden_state)
    whole = model.pooling(outputs.last_hidden_state[:12], torch.tensor([0, 12], dtype=torch.int32), 12)
    torch.testing.assert_close(outputs.pooler_output[:1], whole)
    assert (whole - alone.pooler_output).abs().max() > 1e-3


def test_merge_order_changes_the_order_of_patches_and_nothing_else() -> None:
    from vlparts.parts.packing import merge_order

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


def test_compiles_without_graph_breaks_and_serves_other_images() -> None:
    from vlparts.parts.packing import get_cu_seqlens, get_max_seqlen, get_position_ids

    model = navit()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for grid_list in (GRIDS, [(2, 3), (5, 4)]):
        patches, grids = packed_images(grid_list)
        cu_seqlens = get_cu_seqlens(grids)
        outputs = compiled(
            patches,
            grids,
            cu_seqlens=cu_seqlens,
            max_seqlen=get_max_seqlen(cu_seqlens),
            position_ids=get_position_ids(grids),
        )
        torch.testing.assert_close(outputs.last_hidden_state, model(patches, grids).last_hidden_state)


def test_a_batch_without_images_is_empty() -> None:
    outputs = navit()(torch.zeros(0, 48), torch.zeros(0, 3, dtype=torch.int64))
    assert outputs.last_hidden_state.shape == (0, 32)
    assert outputs.pooler_output.shape == (0, 32)


def test_pooling_can_be_left_out() -> None:
    model = navit(pooling="none")
    assert model.pooling is None
    assert model(*packed_images([(2, 2)])).pooler_output is None


@pytest.mark.parametrize(
    ("patches", "grids", "message"),
    [
        (torch.zeros(4, 47), [[1, 2, 2]], r"`pixel_values` must have shape \(patches, 48\), got \(4, 47\)"),
        (torch.zeros(5, 48), [[1, 2, 2]], "4.*5|5.*4"),
        (torch.zeros(4, 48), [[1, 0, 2]], "image 0|0"),
        (torch.zeros(4, 48), [[2, 2]], "shape"),
    ],
)
def test_bad_input(patches: torch.Tensor, grids: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        navit()(patches, torch.tensor(grids))


def test_absolute_positions_refuse_larger_grids_and_fractional_ones_do_not() -> None:
    patches, grids = packed_images([(2, 9)])
    with pytest.raises(ValueError, match="position_ids.*8"):
        navit(position_coordinates="absolute")(patches, grids)
    assert navit(position_coordinates="fractional")(patches, grids).last_hidden_state.shape == (18, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "num_attention_heads"),
        ({"patch_size": 0}, "patch_size"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"position_coordinates": "polar"}, "position_coordinates"),
        ({"pooling": "median"}, "pooling"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        navit_config(**changes)


def test_presets() -> None:
    assert "base" in NaViTConfig.presets()
    assert NaViTConfig.from_preset("tiny", patch_size=8).patch_size == 8
    with pytest.raises(ValueError, match="'huge'"):
        NaViTConfig.from_preset("huge")


def test_every_weight_is_initialised() -> None:
    model = NaViTModel(navit_config(initializer_range=0.5, position_initializer_range=3.0))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if "position_embedding" in name:
            assert 2.4 < parameter.std() < 3.6, name
        elif parameter.ndim > 1 or name.endswith("probe"):
            assert 0.3 < parameter.std() < 0.7, name


def test_weights_that_a_checkpoint_lacks_are_initialised(tmp_path: object) -> None:
    """Loading builds the model without memory first: what is not in the file must not stay uninitialised."""
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
