"""The text model of the layout "custom_llama" in float64, one token, head and layer after the other."""

import math
from typing import Any

import torch
from torch import Tensor


def get_logits(tensors: dict[str, Tensor], text: dict[str, Any], ids: list[int]) -> Tensor:
    """Logits `(tokens, vocabulary)` of one sequence, from the published tensors."""
    weights = {name: tensor.double() for name, tensor in tensors.items() if name.startswith("llm.")}
    states = weights["llm.lm.embed_in.weight"][ids]
    for layer in range(text["num_layers"]):
        block = f"llm.lm.layers.{layer}."
        normed = _norm(states, weights[f"{block}input_layernorm.weight"], text)
        states = states + _attention(normed, weights, f"{block}attention.", text)
        normed = _norm(states, weights[f"{block}post_attention_layernorm.weight"], text)
        up, gate = (normed @ weights[f"{block}mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        inner = up * gate * torch.sigmoid(gate)
        states = states + inner @ weights[f"{block}mlp.dense_4h_to_h.weight"].T
    return _norm(states, weights["llm.lm.final_layer_norm.weight"], text) @ weights["llm.embed_out.weight"].T


def _norm(states: Tensor, weight: Tensor, text: dict[str, Any]) -> Tensor:
    return states / (states.pow(2).mean(-1, keepdim=True) + text["layernorm_epsilon"]).sqrt() * weight


def _linear(states: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return states @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def _attention(states: Tensor, weights: dict[str, Tensor], prefix: str, text: dict[str, Any]) -> Tensor:
    heads, groups = text["num_attention_heads"], text["num_kv_heads"]
    size = text["hidden_size"] // heads
    outputs = []
    for head in range(heads):
        if groups == heads:
            rows = _linear(states, weights, f"{prefix}query_key_value")[:, head * 3 * size : (head + 1) * 3 * size]
            query, key, value = rows[:, :size], rows[:, size : 2 * size], rows[:, 2 * size :]
        else:
            query = _linear(states, weights, f"{prefix}query_dense")[:, head * size : (head + 1) * size]
            start = head // (heads // groups) * 2 * size
            rows = _linear(states, weights, f"{prefix}key_value_dense")[:, start : start + 2 * size]
            key, value = rows[:, :size], rows[:, size:]
        query, key = (_rotate(one, text["rotary_emb_base"]) for one in (query, key))
        mixed = []
        for token in range(len(states)):
            scores = key[: token + 1] @ query[token] / math.sqrt(size)
            mixed.append(scores.softmax(0) @ value[: token + 1])
        outputs.append(torch.stack(mixed))
    return torch.cat(outputs, -1) @ weights[f"{prefix}dense.weight"].T


def _rotate(rows: Tensor, base: float) -> Tensor:
    half = rows.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(len(rows), dtype=torch.float64)[:, None] * frequencies
    first, second = rows[:, :half], rows[:, half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)
