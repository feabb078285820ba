"""NaViT against native Siglip2 with the same weights: packed against padded, the block and the pooling head."""

import torch
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from tests.tiny import SIZES, navit_config, order_one, packed_images
from vlparts import NaViTModel

GRIDS = [(3, 5), (1, 1), (4, 4), (2, 7)]


def copy(target: nn.Module, source: nn.Module) -> None:
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        mine.copy_(theirs)


@torch.no_grad()
def from_siglip2(native: Siglip2VisionModel) -> NaViTModel:
    """A NaViT without query-key normalisation and positions, with Siglip2's weights."""
    model = NaViTModel(
        navit_config(qkv_bias=True, layer_norm_bias=True, use_qk_norm=False, hidden_act=native.config.hidden_act)
    ).double()
    native.embeddings.position_embedding.weight.zero_()
    for table in (model.embeddings.position_embedding.row, model.embeddings.position_embedding.column):
        table.zero_()
    # Siglip2 flattens a patch as rows, columns, channels; NaViT as channels, rows, columns.
    weight = native.embeddings.patch_embedding.weight.unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2).flatten(1)
    model.embeddings.patch_embedding.weight.copy_(weight)
    model.embeddings.patch_embedding.bias.copy_(native.embeddings.patch_embedding.bias)
    for layer, other in zip(model.layers, native.encoder.layers, strict=True):
        copy(layer.norm1, other.layer_norm1)
        copy(layer.norm2, other.layer_norm2)
        attention = other.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        layer.self_attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        layer.self_attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        copy(layer.self_attn.o_proj, attention.out_proj)
        copy(layer.mlp.fc1, other.mlp.fc1)
        copy(layer.mlp.fc2, other.mlp.fc2)
    copy(model.norm, native.post_layernorm)
    pooling, head = model.pooling, native.head
    pooling.probe.copy_(head.probe.flatten())
    weights, biases = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    for part, weight, bias in zip((pooling.q_proj, pooling.k_proj, pooling.v_proj), weights, biases, strict=True):
        part.weight.copy_(weight)
        part.bias.copy_(bias)
    copy(pooling.o_proj, head.attention.out_proj)
    copy(pooling.norm, head.layernorm)
    copy(pooling.fc1, head.mlp.fc1)
    copy(pooling.fc2, head.mlp.fc2)
    return model.eval()


def channels_last(patches: Tensor) -> Tensor:
    return patches.unflatten(1, (3, 4, 4)).permute(0, 2, 3, 1).flatten(1)


def test_equals_siglip2() -> None:
    config = Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4)
    native = order_one(Siglip2VisionModel(config)).double().eval()
    model = from_siglip2(native)
    patches, grids = packed_images(GRIDS, dtype=torch.float64)
    outputs = model(patches, grids)

    lengths = grids.prod(-1)
    rows = nn.utils.rnn.pad_sequence(channels_last(patches).split(lengths.tolist()), batch_first=True)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    expected = native(rows, mask.long(), grids[:, 1:])
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state[mask])
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output)
