"""Encoders for `torch.export` and ONNX: how each is built, and inputs for two sets of images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from tests.parts.qwen_towers import TOWERS
from tests.parts.test_deepencoder import small
from tests.parts.test_fused_vision import encoders
from tests.tiny import WINDOWED, navit, navit_config, order_one, packed_images, windowfree
from vlparts import (
    FusedVisionModel,
    NaViTForImageClassification,
    WindowFreeViTConfig,
    WindowFreeViTModel,
)

Inputs = dict[str, Tensor]
# The second set differs in number and sizes, and has videos.
GRIDS = ([(4, 6), (2, 2), (6, 2)], [(2, 6), (8, 2), (3, 6, 4), (2, 2, 2)])
VECTORS = ("last_hidden_state", "pooler_output")


class Packed(NamedTuple):
    """A packed encoder.

    Attributes:
        build: Makes the model.
        results: Outputs that are compared.
        patch_width: Values of a patch.
        raw: Whether pixels are uint8.
    """

    build: Callable[[], PreTrainedModel]
    results: tuple[str, ...] = VECTORS
    patch_width: int = 48
    raw: bool = False

    def inputs(self, index: int) -> Inputs:
        """Patches and grids of the first or the second set of images."""
        pixels, grids = packed_images(GRIDS[index], self.patch_width, seed=index)
        if self.raw:
            pixels = (pixels * 60 + 128).clamp(0, 255).to(torch.uint8)
        return {"pixel_values": pixels, "image_grid_thw": grids}


class Bare(nn.Module):
    """A model with tensors as positional arguments and results."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], results: tuple[str, ...], **options: Any) -> None:
        super().__init__()
        self.model, self.names, self.results, self.options = model, names, results, options

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(**dict(zip(self.names, tensors, strict=True)), **self.options)
        found = [outputs[name] for name in self.results]
        return tuple(x for one in found for x in (one if isinstance(one, tuple) else (one,)))


def classifier() -> NaViTForImageClassification:
    return order_one(NaViTForImageClassification(navit_config(num_labels=5))).eval()


def qwen(kind: str) -> WindowFreeViTModel:
    tower = TOWERS[kind]
    return order_one(WindowFreeViTModel(WindowFreeViTConfig.from_preset(tower.preset, **tower.changes))).eval()


def joint(**changes: Any) -> PreTrainedModel:
    return navit(position_combination="joint", **changes)


PACKED = {
    "navit": Packed(navit),
    "navit with prefix tokens": Packed(
        lambda: navit(pooling="class_token", num_register_tokens=2, rotary_theta=100.0, max_frames=3),
        (*VECTORS, "prefix_hidden_state"),
    ),
    "navit of clips": Packed(lambda: navit(video_attention="clip", max_frames=3)),
    "navit of clips with class tokens": Packed(lambda: navit(video_attention="clip", pooling="class_token")),
    "navit with mean pooling": Packed(lambda: navit(pooling="mean", position_kind="sinusoidal")),
    "navit with maxima": Packed(lambda: navit(pooling="max", position_kind="fourier", use_qk_norm=False)),
    "navit without positions": Packed(lambda: navit(pooling="none", position_kind="none"), VECTORS[:1]),
    "navit with merge blocks": Packed(lambda: navit(spatial_merge_size=2, position_combination="stack")),
    "navit with aspect ratios": Packed(lambda: navit(position_coordinates="fractional_aspect")),
    "navit with an antialiased table": Packed(lambda: joint(position_interpolation="bicubic_antialias")),
    "navit with a table that is enlarged": Packed(
        lambda: joint(position_coordinates="absolute", position_overflow="interpolate", max_grid_size=5)
    ),
    "navit with ViT's table": Packed(lambda: navit(position_combination="flat", position_coordinates="absolute")),
    "classifier": Packed(classifier, ("logits",)),
    "windowfree": Packed(lambda: windowfree(pooling="mean")),
    "windowfree of raw pixels": Packed(lambda: windowfree(pooling="mean"), raw=True),
    "windowed": Packed(
        lambda: windowfree(attention_pattern=WINDOWED, pooling="mean", feature_layers=[-1, -3]),
        (*VECTORS, "feature_maps"),
    ),
    "qwen2_vl": Packed(lambda: qwen("qwen2_vl"), VECTORS[:1], 96),
    "qwen2_5_vl": Packed(lambda: qwen("qwen2_5_vl"), VECTORS[:1], 96),
    "qwen3_vl": Packed(lambda: qwen("qwen3_vl"), ("feature_maps",), 96),
}
PACKED_SHAPES = {"pixel_values": {0: Dim.DYNAMIC}, "image_grid_thw": {0: Dim.DYNAMIC}}


def dropped_patches(index: int) -> tuple[Tensor, ...]:
    """Patches, grids and `keep_index` of some patches of the first or the second set, with padding."""
    kept = ([0, 3, 5, 23, 24, 25, 30, 39, -1, -1], [0, 11, 12, 30, 31, 60, 99, 102, 107, -1])[index]
    given, keep_index = PACKED["navit"].inputs(index), torch.tensor(kept)
    return given["pixel_values"][keep_index], given["image_grid_thw"], keep_index


def fused_vision() -> Bare:
    return Bare(FusedVisionModel.from_encoders(*encoders()).eval(), ("pixel_values",), ("feature_maps",))


def fused_inputs(index: int) -> tuple[Tensor]:
    return (torch.randn(3 + 2 * index, 3, 16, 16),)


# Views of two sizes, with and without tiles.
VIEWS = {
    "pages": ([(1, 8, 8), (1, 4, 12), (1, 8, 8)], None),
    "tiles": ([(1, 4, 4), (1, 4, 4), (1, 12, 8), (1, 8, 4)], [[1, 2], [0, 0]]),
}


def deepencoder(name: str) -> tuple[Bare, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The encoder of views of these sizes, and inputs with two sets of pixels."""
    grids, tiles = VIEWS[name]
    given = {"image_grid_thw": torch.tensor(grids)}
    if tiles is not None:
        given["tile_grid"] = torch.tensor(tiles)
    model = small(feature_layers=[0, -1])
    names = ("pixel_values", *given)
    results = ("last_hidden_state", "feature_maps", "view_index", "tokens_per_image")
    patches = int(given["image_grid_thw"].prod(-1).sum())
    first, second = ((torch.rand(patches, 768) * 2 - 1, *given.values()) for _ in range(2))
    return Bare(model, names, results, **model.precompute(**given)), first, second
