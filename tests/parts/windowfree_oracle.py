"""The window-free encoder and its hybrid, written from the published description: one frame at a time in reading
order, dense masks, loops over heads, explicit rotations.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from vlparts import WindowFreeViTModel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, rows: Tensor, columns: Tensor, theta: float) -> Tensor:
    """Rotate the pairs (c, c + D/2) of `(patches, D)` by angles of the row, then of the column."""
    half = x.shape[1] // 2
    turned = x.clone()
    for pair in range(half):
        place = rows if pair < half // 2 else columns
        angle = place.double() * theta ** (-2 * (pair % (half // 2)) / half)
        a, b = x[:, pair], x[:, pair + half]
        turned[:, pair] = a * angle.cos() - b * angle.sin()
        turned[:, pair + half] = b * angle.cos() + a * angle.sin()
    return turned


def encode_frame(model: WindowFreeViTModel, patches: Tensor, rows: int, columns: int) -> list[Tensor]:
    """Normalised outputs `(rows * columns, D)` of every layer, for the patches of a frame in reading order."""
    config = model.config
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    planes = patches.reshape(len(patches), config.num_channels, 1, config.patch_size**2)
    repeated = torch.cat([planes] * config.temporal_patch_size, dim=2).flatten(1)
    hidden = repeated @ model.patch_embedding.projection.weight.T
    outputs = []
    for index, layer in enumerate(model.layers):
        sees = torch.ones(len(patches), len(patches), dtype=torch.bool)
        pattern = config.attention_pattern
        if pattern != "full" and index not in pattern["full_attention_layers"]:
            edge = pattern["window_size"] // config.patch_size
            window = row // edge * math.ceil(columns / edge) + column // edge
            sees = window[:, None] == window[None, :]
        hidden = hidden + attend(layer, rms_norm(hidden, layer.norm1.weight, config.rms_norm_eps), sees, row, column)
        normed = rms_norm(hidden, layer.norm2.weight, config.rms_norm_eps)
        mlp = layer.mlp
        if config.gated_mlp:
            inner = F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        else:
            up = mlp.up_proj(normed)
            inner = up * (1 + torch.erf(up / 2**0.5)) / 2
        hidden = hidden + mlp.down_proj(inner)
        outputs.append(rms_norm(hidden, model.norm.weight, config.rms_norm_eps))
    return outputs


def attend(layer: torch.nn.Module, hidden: Tensor, sees: Tensor, row: Tensor, column: Tensor) -> Tensor:
    attention = layer.self_attn
    config = attention.config
    width = config.hidden_size // config.num_attention_heads
    query, key, value = attention.qkv(hidden).split(config.hidden_size, -1)
    heads = []
    for start in range(0, config.hidden_size, width):
        part = slice(start, start + width)
        q, k = (rotate(x[:, part], row, column, config.rotary_theta) for x in (query, key))
        scores = (q @ k.T / width**0.5).masked_fill(~sees, -math.inf)
        heads.append(torch.softmax(scores, -1) @ value[:, part])
    return attention.o_proj(torch.cat(heads, -1))


def reading_order(rows: int, columns: int, merge_size: int) -> list[int]:
    """Index in reading order of each patch of a frame in packed order."""
    return [
        (top + down) * columns + left + across
        for top in range(0, rows, merge_size)
        for left in range(0, columns, merge_size)
        for down in range(merge_size)
        for across in range(merge_size)
    ]


def oracle(model: WindowFreeViTModel, pixels: Tensor, grids: list[tuple[int, int, int]]) -> list[Tensor]:
    """Normalised outputs `(L, D)` of every layer in the packed order."""
    frames = list(_frames(model, pixels, grids))
    return [torch.cat(parts) for parts in zip(*frames, strict=True)]


def _frames(model: WindowFreeViTModel, pixels: Tensor, grids: list[tuple[int, int, int]]) -> Iterator[list[Tensor]]:
    start = 0
    for frames, rows, columns in grids:
        for _ in range(frames):
            order = torch.tensor(reading_order(rows, columns, model.config.spatial_merge_size))
            packed = pixels[start : start + rows * columns]
            raster = packed[order.argsort()]
            yield [states[order] for states in encode_frame(model, raster, rows, columns)]
            start += rows * columns
