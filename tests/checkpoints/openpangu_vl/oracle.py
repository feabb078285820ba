"""openPangu-VL's visual stack in loops and with dense masks, in float64, from tensors with the published names.

Shapes: h and w rows and columns of a frame in patches, D width, H heads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


class VisualStack:
    """The published data flow.

    Args:
        tensors: By published name, queries, keys and values fused.
        config: The published "vision_config".
    """

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.tensors = {name.removeprefix("visual."): tensor.double() for name, tensor in tensors.items()}
        self.config = config

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        rows = [row / (row.pow(2).mean() + self.config["rms_norm_eps"]).sqrt() for row in x]
        return torch.stack(rows) * self.tensors[f"{name}.weight"]

    def __call__(self, pixels: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
        """Tokens of all images and videos, from patches of one frame each."""
        tokens, start = [], 0
        for frames, height, width in grids:
            for _ in range(frames):
                frame = pixels[start : start + height * width].double()
                tokens.append(self.frame(frame, height, width))
                start += height * width
        assert start == len(pixels)
        return torch.cat(tokens)

    def frame(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """Tokens of one image or frame, cell by cell."""
        places = [
            (row + i, column + j)
            for row in range(0, height, 2)
            for column in range(0, width, 2)
            for i in range(2)
            for j in range(2)
        ]
        x = torch.stack([self.embed(patch) for patch in pixels])
        taps = []
        for index in range(self.config["depth"]):
            block = f"blocks.{index}"
            x = x + self.attention(f"{block}.attn", self.norm(f"{block}.norm1", x), places, self.mask(index, places))
            x = x + self.mlp(f"{block}.mlp", self.norm(f"{block}.norm2", x))
            if index in (self.config["depth"] - 3, self.config["depth"] - 1):
                taps.append(self.norm("final_layernorm", x))
        merged = self.merge("merger.0", taps[1]) + self.merge("merger.1", taps[0])
        return self.linear("vision_projection.fc1", silu(merged))

    def embed(self, patch: Tensor) -> Tensor:
        """One patch `(C*P*P,)`; its frame is used for both frames of the weights."""
        weight = self.tensors["patch_embed.proj.weight"]
        planes = patch.reshape(weight.shape[1], *weight.shape[3:])
        return sum((weight[:, :, time] * planes).sum((1, 2, 3)) for time in range(weight.shape[2]))

    def mask(self, index: int, places: list[tuple[int, int]]) -> Tensor:
        """Which patches see which, `(h*w, h*w)` bool."""
        if index in self.config["fullatt_block_indexes"]:
            return torch.ones(len(places), len(places), dtype=torch.bool)
        side = self.config["window_size"] // self.config["patch_size"]
        windows = [(row // side, column // side) for row, column in places]
        return torch.tensor([[one == other for other in windows] for one in windows])

    def attention(self, name: str, x: Tensor, places: list[tuple[int, int]], mask: Tensor) -> Tensor:
        heads = self.config["num_heads"]
        size = x.shape[1] // heads
        qkv = self.linear(f"{name}.qkv", x).reshape(len(x), 3, heads, size)
        outputs = []
        for head in range(heads):
            query = torch.stack([rotate(row, place) for row, place in zip(qkv[:, 0, head], places, strict=True)])
            key = torch.stack([rotate(row, place) for row, place in zip(qkv[:, 1, head], places, strict=True)])
            scores = (query @ key.T * size**-0.5).masked_fill(~mask, -torch.inf)
            outputs.append(scores.softmax(-1) @ qkv[:, 2, head])
        return self.linear(f"{name}.proj", torch.cat(outputs, -1))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        if self.config["hidden_act"] == "silu":
            gate = silu(self.linear(f"{name}.gate_proj", x))
            return self.linear(f"{name}.down_proj", gate * self.linear(f"{name}.up_proj", x))
        return self.linear(f"{name}.down_proj", gelu(self.linear(f"{name}.up_proj", x)))

    def merge(self, name: str, x: Tensor) -> Tensor:
        """Four patches that follow each other become one token."""
        normed = self.norm(f"{name}.ln_q", x)
        cells = torch.stack([torch.cat(list(normed[first : first + 4])) for first in range(0, len(x), 4)])
        return self.linear(f"{name}.mlp.2", gelu(self.linear(f"{name}.mlp.0", cells)))


def rotate(row: Tensor, place: tuple[int, int]) -> Tensor:
    """Turn one head's query or key: frequencies of the row, then of the column, channels paired half a head apart."""
    half = len(row) // 2
    frequencies = [10000.0 ** (-2 * i / half) for i in range(half // 2)]
    angles = torch.tensor([place[axis] * one for axis in range(2) for one in frequencies], dtype=torch.float64)
    first, second = row[:half], row[half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()))
