"""Window-free, hybrid and windowed encoders at full width with few layers: ours and the native tower of Qwen2.5-VL."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from vlparts import WindowFreeViTConfig, WindowFreeViTModel
from vlparts.parts.packed_windows import get_windows, permute_blocks

# Qwen2.5-VL's tower: 32 layers of a ViT-H, four of them without windows.
VIT_H = {"hidden_size": 1280, "intermediate_size": 3420, "num_attention_heads": 16}
GATED = {"gated_mlp": True, "hidden_act": "silu"}
WINDOW = 112  # pixels


class Depth(NamedTuple):
    """Layers of a whole encoder."""

    windowed: int
    full: int


class Rival(NamedTuple):
    """An encoder of about 615 million parameters."""

    depth: Depth
    build: Callable[[int, list[int]], nn.Module]


def native(layers: int, full: list[int]) -> nn.Module:
    """The native tower without its merger."""
    config = Qwen2_5_VLVisionConfig(
        depth=layers,
        hidden_size=VIT_H["hidden_size"],
        intermediate_size=VIT_H["intermediate_size"],
        num_heads=VIT_H["num_attention_heads"],
        fullatt_block_indexes=full,
        window_size=WINDOW,
    )
    model = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    model.merger = nn.Identity()
    return model


def ours_as_native(layers: int, full: list[int]) -> WindowFreeViTModel:
    """Our encoder in the shape of the native tower."""
    return _ours(layers, full, **VIT_H, **GATED)


def ours_as_openpangu(layers: int, full: list[int]) -> WindowFreeViTModel:
    """Our encoder in openPangu-VL's shape."""
    return _ours(layers, full)


def _ours(layers: int, full: list[int], **sizes: Any) -> WindowFreeViTModel:
    pattern = {"window_size": WINDOW, "full_attention_layers": full}
    if len(full) == layers:
        pattern = "full"
    return WindowFreeViTModel(WindowFreeViTConfig(num_hidden_layers=layers, attention_pattern=pattern, **sizes)).eval()


RIVALS = {
    "window-free, 26 x 1536": Rival(Depth(0, 26), ours_as_openpangu),
    "openPangu hybrid, 26 x 1536": Rival(Depth(22, 4), ours_as_openpangu),
    "windowed ViT-H, 32 x 1280": Rival(Depth(28, 4), ours_as_native),
    "windowed ViT-H, native": Rival(Depth(28, 4), native),
}


def copy_weights(source: nn.Module, target: WindowFreeViTModel) -> None:
    """The native tower's weights into ours."""
    names = {"blocks.": "layers.", ".attn.qkv": ".self_attn.qkv", ".attn.proj": ".self_attn.o_proj"}
    weights = {"norm.weight": target.norm.weight}
    for name, tensor in source.state_dict().items():
        for theirs, mine in names.items():
            name = name.replace(theirs, mine)
        if name.startswith("patch_embed."):
            name, tensor = "patch_embedding.projection.weight", tensor.flatten(1)
        weights[name] = tensor
    target.load_state_dict(weights)


def in_reading_order(states: Tensor, grid: Tensor) -> Tensor:
    """The native tower's states, which stand window by window, in the order of the patches."""
    return permute_blocks(states, get_windows(grid, WINDOW // 28, 2).inverse)


class Counter(TorchDispatchMode):
    """Counts the operations that launch work, and the bytes that permutations read and write."""

    VIEWS = ("view", "as_strided", "transpose", "permute", "slice", "select", "split", "unbind", "expand", "unsqueeze")
    FREE = ("empty", "t.", "detach", "squeeze", "alias", "reshape", "flatten", "unflatten", "lift", "_local_scalar")

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.permuted = 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Run the operation and count it."""
        result = operation(*arguments, **(options or {}))
        name = str(operation).removeprefix("aten.")
        if not name.startswith((*self.VIEWS, *self.FREE)):
            self.launches += 1
            if name.startswith("index") and result.ndim > 1:
                self.permuted += 2 * result.numel() * result.element_size()
        return result


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what is run inside."""
    counter = Counter()
    with counter, torch.no_grad():
        yield counter
