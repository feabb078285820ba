"""CPU forms of torch_npu's attention operations in plain PyTorch, from their documentation.

Shapes: `H` heads, `Lq` queries, `Lk` keys.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.npu_stub.references import gradients, reference

# Sparse modes of the mask of 2048 x 2048: causal, with the starts or the ends of queries and keys aligned.
FROM_THE_START, FROM_THE_END = 2, 3
DEFAULTS = {"pse": None, "padding_mask": None, "prefix": None, "sink": None, "keep_prob": 1.0, "softmax_layout": ""}


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, masked: Tensor | None) -> tuple[Tensor, ...]:
    """Return attention `(..., H, Lq, D)`, and the largest score and the sum of exponentials `(..., H, Lq, 1)`."""
    share = query.shape[-3] // key.shape[-3]
    key, value = (x.repeat_interleave(share, -3).float() for x in (key, value))
    scores = query.float() @ key.transpose(-1, -2) * scale
    if masked is not None:
        scores = scores.masked_fill(masked, -math.inf)
    if scores.shape[-1] == 0:
        none = scores.new_zeros(*scores.shape[:-1], 1)
        return scores @ value, none, none
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    powers = (scores - top).exp()
    total = powers.sum(-1, keepdim=True)
    return (powers / total.masked_fill(total == 0, 1.0)) @ value, top, total


def masked_pairs(mask: Tensor | None, mode: int, length_q: int, length_k: int) -> Tensor | None:
    """Return the pairs that a mask and a sparse mode exclude, `(..., Lq, Lk)`."""
    if mask is None:
        return None
    if mode in (FROM_THE_START, FROM_THE_END):
        if not torch.equal(mask.bool(), torch.ones(2048, 2048, dtype=torch.bool).triu(1)):
            raise ValueError(
                f"`atten_mask` must be the mask of 2048 x 2048 for sparse mode {mode}, got {tuple(mask.shape)}."
            )
        offset = length_k - length_q if mode == FROM_THE_END else 0
        return torch.ones(length_q, length_k, dtype=torch.bool).triu(1 + offset)
    if mode not in (0, 1) or mask.shape[-2:] != (length_q, length_k):
        raise NotImplementedError(f"Sparse mode {mode} with a mask of shape {tuple(mask.shape)} is not implemented.")
    return mask.bool()


def make_attention(given: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    """Return attention of query, key and value in the layout and with the segments of a call."""
    for name, usual in DEFAULTS.items():
        if given.get(name, usual) != usual:
            raise NotImplementedError(f"`{name}={given[name]}` is not implemented.")
    mask, mode, layout = given["atten_mask"], given["sparse_mode"], given["input_layout"]
    scale = given.get("scale", given.get("scale_value"))
    ends = [given.get(name) for name in ("actual_seq_qlen", "actual_seq_kvlen")]

    def dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return attend(query, key, value, scale, masked_pairs(mask, mode, query.shape[-2], key.shape[-2]))

    def packed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        ends_q, ends_k = (list(x) for x in ends)
        for one, tokens in ((ends_q, len(query)), (ends_k, len(key))):
            if one != sorted(one) or one[-1] != tokens or len(one) > 1024:
                raise ValueError(f"Segment ends must rise to {tokens}, at most 1,024 of them, got {one[:9]}.")
        found = []
        for q0, q1, k0, k1 in zip([0, *ends_q], ends_q, [0, *ends_k], ends_k, strict=False):
            pieces = (query[q0:q1], key[k0:k1], value[k0:k1])
            found.append([x.transpose(0, 1) for x in dense(*(x.transpose(0, 1) for x in pieces))])
        return tuple(torch.cat(x) for x in zip(*found, strict=True))

    if layout not in ("TND", "BNSD") or given["head_num"] != given["query"].shape[1]:
        raise NotImplementedError(f"Layout {layout} with {given['head_num']} heads is not implemented.")
    return packed if layout == "TND" else dense


def forward(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs that all forward operations share."""
    query = given["query"]
    output, top, total = make_attention(given)(query, given["key"], given["value"])
    lanes = [x.expand(*x.shape[:-1], 8).contiguous() for x in (top, total)]
    return output.to(query.dtype), lanes[0], lanes[1], torch.empty(0, dtype=query.dtype)


def backward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the outputs that all backward operations share."""
    attention, dtype = make_attention(given), given["query"].dtype
    inputs = [given[name] for name in ("query", "key", "value")]
    found = gradients(lambda *inputs: attention(*inputs)[0].to(dtype), inputs, given["dy"])
    return *found, torch.empty(0, dtype=dtype), torch.empty(0)


@reference("npu::npu_fusion_attention")
def fusion_attention(**given: Any) -> tuple[Any, ...]:
    return *forward(given), 0, 0, 0


@reference("npu::npu_fusion_attention_grad")
def fusion_attention_grad(**given: Any) -> tuple[Tensor, ...]:
    return backward(given)


@reference("npu::npu_fusion_attention_v3")  # which `scaled_dot_product_attention` calls
def fusion_attention_v3(**given: Any) -> tuple[Tensor, ...]:
    return *forward(given), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)


@reference("npu::npu_fusion_attention_grad_v3")
def fusion_attention_grad_v3(**given: Any) -> tuple[Tensor, ...]:
    return backward(given)


@reference("npu::npu_fused_infer_attention_score")
def fused_infer_attention_score(**given: Any) -> tuple[Tensor, Tensor]:
    if given["num_key_value_heads"] not in (0, given["key"].shape[1]):
        raise ValueError(
            f"`num_key_value_heads` is {given['num_key_value_heads']}, but `key` has {given['key'].shape[1]}."
        )
    ends = {"actual_seq_qlen": given["actual_seq_lengths"], "actual_seq_kvlen": given["actual_seq_lengths_kv"]}
    return forward({**given, **ends, "head_num": given["num_heads"]})[0], torch.empty(0)
