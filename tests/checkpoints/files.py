"""Published folders for tests: shapes and random weights, written and read with safetensors only."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def layer_shapes(prefix: str, out_features: int, in_features: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """A linear layer's tensors."""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.weight": (out_features, in_features)}
    return shapes | {f"{prefix}.bias": (out_features,)} if bias else shapes


def decoder_layer_shapes(config: dict[str, Any], layer: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a text layer besides its MLP: norms and attention with biases."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or width // heads
    queries, keys = head_dim * heads, head_dim * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")
    }
    for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        shapes |= layer_shapes(f"{layer}.self_attn.{name}", size, width)
    return shapes | layer_shapes(f"{layer}.self_attn.o_proj", width, queries)


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """bfloat16 weights such that every layer's output is of order one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scaled = 0.5 * noise if len(shape) == 1 else noise * torch.Size(shape[1:]).numel() ** -0.5
        tensors[name] = (scaled + (1.0 if len(shape) == 1 else 0.0)).bfloat16()
    return tensors


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], shards: int = 4) -> Path:
    """Write a checkpoint with consecutive tensors, such as the parts of one model tensor, in different files."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    files = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    weight_map = {name: files[index % shards] for index, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder; the index must name each in its file."""
    index = folder / "model.safetensors.index.json"
    tensors, weight_map = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensors[name], weight_map[name] = opened.get_tensor(name), path.name
    if index.is_file():
        assert json.loads(index.read_text(encoding="utf-8"))["weight_map"] == weight_map
    return tensors


def assert_same_bytes(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Equal names, types, shapes and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8)), name
