"""Small native vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and encoders of ours with the same weights."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from tests.tiny import order_one
from vlparts import WindowFreeViTConfig, WindowFreeViTModel
from vlparts.parts.packed_windows import get_windows, permute_blocks

WIDTH, INNER, LAYERS, HEADS, PATCH = 32, 48, 4, 2, 4


class Tower(NamedTuple):
    """A native tower: its classes, the fields of a small one, and those of ours that differ from the preset's."""

    config: type
    model: type
    fields: dict[str, Any]
    preset: str
    changes: dict[str, Any]


_OURS = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "patch_size": PATCH,
}
_COMMON = {"depth": LAYERS, "num_heads": HEADS, "patch_size": PATCH}
_SIZES = {**_COMMON, "hidden_size": WIDTH, "intermediate_size": INNER, "out_hidden_size": 24}
TOWERS = {
    "qwen2_vl": Tower(
        Qwen2VLVisionConfig,
        Qwen2VisionTransformerPretrainedModel,
        {**_COMMON, "embed_dim": WIDTH, "hidden_size": 24, "mlp_ratio": 2},
        "qwen2_vl_vit",
        {**_OURS, "intermediate_size": 2 * WIDTH},
    ),
    "qwen2_5_vl": Tower(
        Qwen2_5_VLVisionConfig,
        Qwen2_5_VisionTransformerPretrainedModel,
        {**_SIZES, "window_size": 16, "fullatt_block_indexes": [1, 3]},
        "qwen2_5_vl_vit",
        {**_OURS, "attention_pattern": {"window_size": 16, "full_attention_layers": [1, 3]}},
    ),
    "qwen3_vl": Tower(
        Qwen3VLVisionConfig,
        Qwen3VLVisionModel,
        {**_SIZES, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
        "qwen3_vl_vit",
        {**_OURS, "position_grid_size": 5, "feature_layers": [-1, 0, 2]},
    ),
}
_NAMES = {
    "patch_embed.proj": "patch_embedding.projection",
    "pos_embed": "position_table",
    "blocks.": "layers.",
    ".attn.qkv": ".self_attn.qkv",
    ".attn.proj": ".self_attn.o_proj",
    ".mlp.linear_fc1": ".mlp.up_proj",
    ".mlp.linear_fc2": ".mlp.down_proj",
    ".mlp.fc1": ".mlp.up_proj",
    ".mlp.fc2": ".mlp.down_proj",
}


def native_tower(kind: str) -> nn.Module:
    """A float64 tower with weights of order one."""
    tower = TOWERS[kind]
    return order_one(tower.model._from_config(tower.config(**tower.fields)).double()).eval()


def ours_like(kind: str, native: nn.Module, **changes: Any) -> WindowFreeViTModel:
    """Our encoder with the weights of a native tower, by the names alone."""
    tower = TOWERS[kind]
    model = WindowFreeViTModel(WindowFreeViTConfig.from_preset(tower.preset, **{**tower.changes, **changes})).double()
    weights = {}
    for name, tensor in native.state_dict().items():
        if name.startswith(("merger.", "deepstack_merger_list.")):
            continue
        for theirs, mine in _NAMES.items():
            name = name.replace(theirs, mine)
        weights[name] = tensor.flatten(1) if name == "patch_embedding.projection.weight" else tensor
    model.load_state_dict(weights)
    return model.eval()


def native_features(kind: str, native: nn.Module, pixels: Tensor, grid: Tensor) -> list[Tensor]:
    """Un-merged features `(L, D)` of the last layer and of each DeepStack layer, in the order of the patches."""
    found: dict[int, Tensor] = {}
    layers = [LAYERS - 1, *getattr(native.config, "deepstack_visual_indexes", ())]
    hooks = [
        native.blocks[layer].register_forward_hook(lambda *call, layer=layer: found.update({layer: call[2]}))
        for layer in layers
    ]
    outputs = native(pixels, grid)
    for hook in hooks:
        hook.remove()
    assert torch.equal(outputs.last_hidden_state, found[LAYERS - 1])
    features = [found[layer] for layer in layers]
    if kind != "qwen2_5_vl":
        return features
    inverse = get_windows(grid, native.config.window_size // (2 * PATCH), 2).inverse
    return [permute_blocks(one, inverse) for one in features]
