"""NaViT for one image at a time: loops over heads and patches, explicit softmax, with a model's weights."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlparts import NaViTModel


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + norm.eps)
    return normed * norm.weight + (0 if norm.bias is None else norm.bias)


def fractional_positions(model: NaViTModel, rows: int, columns: int) -> Tensor:
    """Embeddings `(rows * columns, D)`: both tables interpolated linearly at half-pixel centres."""
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
    return torch.stack(positions)


def run_layers(model: NaViTModel, hidden: Tensor, rotate: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """All blocks and the final norm, over the tokens `(tokens, D)` of one segment."""
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for layer in model.layers:
        qkv = layer.self_attn.qkv(layer_norm(hidden, layer.norm1))
        query, key, value = qkv.split(config.hidden_size, -1)
        outputs = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            q = rotate(layer_norm(query[:, part], layer.self_attn.q_norm))
            k = rotate(layer_norm(key[:, part], layer.self_attn.k_norm))
            outputs.append(torch.softmax(q @ k.T / width**0.5, -1) @ value[:, part])
        hidden = hidden + layer.self_attn.o_proj(torch.cat(outputs, -1))
        hidden = hidden + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer_norm(hidden, layer.norm2))))
    return layer_norm(hidden, model.norm)


def attention_pool(model: NaViTModel, hidden: Tensor) -> Tensor:
    """Attention pooling of `(tokens, D)` to `(D,)`."""
    heads, width = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
    pool = model.pooling
    query, key, value = pool.q_proj(pool.probe), pool.k_proj(hidden), pool.v_proj(hidden)
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        outputs.append(torch.softmax(key[:, part] @ query[part] / width**0.5, 0) @ value[:, part])
    pooled = pool.o_proj(torch.cat(outputs))
    return pooled + pool.fc2(F.gelu(pool.fc1(layer_norm(pooled, pool.norm))))


def oracle(model: NaViTModel, patches: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Hidden states and pooled vector of one image under the default options."""
    hidden = model.embeddings.patch_embedding(patches) + fractional_positions(model, rows, columns)
    hidden = run_layers(model, hidden)
    return hidden, attention_pool(model, hidden)


def rotation(positions: Tensor, head_dim: int, theta: float) -> Callable[[Tensor], Tensor]:
    """Rotate channel pairs (i, i + d/2): the first half of the pairs by the row, the others by the column."""
    half, quarter = head_dim // 2, head_dim // 4

    def rotate(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for token, (row, column) in enumerate(positions.tolist()):
            for pair in range(half):
                place = row if pair < quarter else column
                angle = torch.tensor(place * theta ** (-2 * (pair % quarter) / half), dtype=x.dtype)
                a, b = x[token, pair], x[token, pair + half]
                out[token, pair] = a * angle.cos() - b * angle.sin()
                out[token, pair + half] = b * angle.cos() + a * angle.sin()
        return out

    return rotate
