"""Encoders of equal width and depth for images of mixed sizes: ours, native towers, and other libraries' NaViT.

Each takes the same packed patches and returns one vector for each patch.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Siglip2VisionConfig, Siglip2VisionModel, ViTConfig, ViTModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from vlparts import NaViTConfig, NaViTModel

PATCH = 16
DEPTH = 12  # layers of ViT-S and ViT-B
PACK = 2048  # tokens of a pack for the encoder that needs a dense mask
PRESETS = {"tiny": "tiny", "ViT-S": "small", "ViT-B": "b16", "ViT-L": "l16"}
OURS, ONE_BY_ONE = "NaViT, packed", "NaViT, image by image"
Run = Callable[[], Tensor]


class Setting(NamedTuple):
    """What is encoded, and how wide the encoders are."""

    size: str
    grid: Tensor
    pixels: Tensor

    @property
    def config(self) -> NaViTConfig:
        """Ours; the others copy its sizes."""
        return NaViTConfig.from_preset(PRESETS[self.size], pooling="none")

    @property
    def lengths(self) -> list[int]:
        """Patches of each image."""
        return self.grid.prod(-1).tolist()


def setting(size: str, images: int, dtype: torch.dtype) -> Setting:
    """Images with sides of 64 to 512 pixels and aspect ratios of 1:4 to 4:1, in whole 2 x 2 blocks of patches."""
    chance = np.random.default_rng(0)
    sides, aspects = chance.uniform(64, 512, images), np.exp(chance.uniform(-np.log(2), np.log(2), images))
    rows = np.maximum(1, np.rint(sides * aspects / (2 * PATCH))) * 2
    columns = np.maximum(1, np.rint(sides / aspects / (2 * PATCH))) * 2
    grid = torch.tensor(np.stack([np.ones(images), rows, columns], 1), dtype=torch.int64)
    return Setting(size, grid, torch.randn(int(grid.prod(-1).sum()), 3 * PATCH**2).to(dtype))


def ours(one: Setting) -> tuple[nn.Module, Run]:
    """NaViT, all images in one sequence."""
    model = NaViTModel(one.config).to(one.pixels.dtype)
    return model, lambda: model(one.pixels, one.grid).last_hidden_state


def image_by_image(model: nn.Module, one: Setting) -> Run:
    """A packed encoder that gets one image at a time."""
    parts = one.pixels.split(one.lengths)
    return lambda: torch.cat([model(part, one.grid[i : i + 1]).last_hidden_state for i, part in enumerate(parts)])


def plain_vit(one: Setting) -> tuple[nn.Module, Run]:
    """Native ViT, one image at a time, its positions interpolated: the simplest way without packing."""
    config = ViTConfig(**_sizes(one.config), image_size=256, patch_size=PATCH)
    model = ViTModel(config, add_pooling_layer=False).to(one.pixels.dtype)
    images = [
        part.unflatten(0, (rows, columns))
        .unflatten(-1, (3, PATCH, PATCH))
        .permute(2, 0, 3, 1, 4)
        .flatten(3)
        .flatten(1, 2)
        for part, (_, rows, columns) in zip(one.pixels.split(one.lengths), one.grid.tolist(), strict=True)
    ]

    def run() -> Tensor:
        rows = [model(image[None], interpolate_pos_encoding=True).last_hidden_state[0, 1:] for image in images]
        return torch.cat(rows)

    return model, run


def siglip2(one: Setting) -> tuple[nn.Module, Run]:
    """Native Siglip2 (NaFlex): every image padded to the longest."""
    config = Siglip2VisionConfig(**_sizes(one.config), num_patches=256, patch_size=PATCH, vision_use_head=False)
    model = Siglip2VisionModel(config).to(one.pixels.dtype)
    rows = nn.utils.rnn.pad_sequence(one.pixels.split(one.lengths), batch_first=True)
    mask = (torch.arange(max(one.lengths))[None] < torch.tensor(one.lengths)[:, None]).long()
    return model, lambda: model(rows, mask, one.grid[:, 1:]).last_hidden_state[mask.bool()]


def qwen2(one: Setting, attention: str = "sdpa") -> tuple[nn.Module, Run]:
    """Native Qwen2-VL tower: packed, rotary positions; "sdpa" has one attention call for each image."""
    width = one.config.hidden_size
    config = Qwen2VLConfig().vision_config.__class__(
        embed_dim=width,
        hidden_size=width,
        mlp_ratio=one.config.intermediate_size // width,
        depth=one.config.num_hidden_layers,
        num_heads=one.config.num_attention_heads,
        patch_size=PATCH,
        temporal_patch_size=1,
    )
    return _qwen(Qwen2VisionTransformerPretrainedModel, config, one, attention)


def qwen25(one: Setting, attention: str = "sdpa") -> tuple[nn.Module, Run]:
    """Native Qwen2.5-VL tower: as above, but three quarters of the layers attend within windows."""
    width, depth = one.config.hidden_size, one.config.num_hidden_layers
    config = Qwen2_5_VLVisionConfig(
        hidden_size=width,
        intermediate_size=one.config.intermediate_size * 2 // 3,  # three matrices for two: equal parameters
        out_hidden_size=width,
        window_size=8 * PATCH,
        fullatt_block_indexes=list(range(2, depth, 3)),
        depth=depth,
        num_heads=one.config.num_attention_heads,
        patch_size=PATCH,
        temporal_patch_size=1,
    )
    return _qwen(Qwen2_5_VisionTransformerPretrainedModel, config, one, attention)


def vit_pytorch(one: Setting) -> tuple[nn.Module, Run]:
    """vit-pytorch's NaViT: packs of 2,048 tokens under a dense mask."""
    module = _load_alone("vit_pytorch", "na_vit")
    config = one.config
    model = module.NaViT(
        image_size=64 * PATCH,
        patch_size=PATCH,
        num_classes=1,
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        dim_head=config.hidden_size // config.num_attention_heads,
        mlp_dim=config.intermediate_size,
    ).to(one.pixels.dtype)
    # Its classifier is left out: every patch's own vector is returned, so the pooling has nothing to do.
    images = [
        part.unflatten(0, (rows, columns))
        .unflatten(-1, (3, PATCH, PATCH))
        .permute(2, 0, 3, 1, 4)
        .flatten(3)
        .flatten(1, 2)
        for part, (_, rows, columns) in zip(one.pixels.split(one.lengths), one.grid.tolist(), strict=True)
    ]
    found: list[Tensor] = []
    model.transformer.register_forward_hook(lambda _, inputs, output: found.append(output))

    def run() -> Tensor:
        found.clear()
        model(images, group_images=True, group_max_seq_len=PACK)
        return found[0].flatten(0, 1)

    return model, run


RIVALS: dict[str, Callable[[Setting], tuple[nn.Module, Run]]] = {
    OURS: ours,
    "native ViT, image by image": plain_vit,
    "native Qwen2.5-VL tower (windows)": qwen25,
    "native Qwen2-VL tower": qwen2,
    "native Siglip2, padded": siglip2,
    "vit-pytorch NaViT, dense mask": vit_pytorch,
}


def _sizes(config: NaViTConfig) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(config, name) for name in names}


def _qwen(make: type[nn.Module], config: object, one: Setting, attention: str) -> tuple[nn.Module, Run]:
    model = make._from_config(config, attn_implementation=attention).to(one.pixels.dtype)
    return model, lambda: model(one.pixels, grid_thw=one.grid).last_hidden_state


def _load_alone(package: str, module: str) -> object:
    """A module of a package without the package's own imports, some of which are not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"This rival needs {package}: pip install --no-deps vit-pytorch")
    name = f"{package}_{module}"
    spec = importlib.util.spec_from_file_location(name, f"{found.submodule_search_locations[0]}/{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded
