"""`torch.ops.npu` without torch_npu: the operations that the kernels call, on the CPU.

PyTorch matches the arguments of calls with the committed schemas, as with the real library. The operations compute
what their documentation says, are differentiable by PyTorch, and assert the documented limits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.npu.schema_lines import committed

VERSION = "2.13"

# Names of the operations that ran, in order.
CALLS: list[str] = []

_references: dict[str, Callable[..., Any]] = {}


def _reference(function: Callable[..., Any]) -> Callable[..., Any]:
    def logged(*arguments: Any, **options: Any) -> Any:
        CALLS.append(function.__name__)
        return function(*arguments, **options)

    _references[function.__name__] = logged
    return function


@_reference
def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = (precise.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (precise * rstd * gamma).to(x.dtype), rstd


@_reference
def npu_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@_reference
def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    assert x.is_contiguous()
    assert x.numel()
    first, second = x.chunk(2, dim)
    return F.silu(first) * second


def _check_cos_sin(x: Tensor, r1: Tensor, r2: Tensor) -> None:
    """Check cosines and sines: T1D for layout TND, 1S1D for BSND."""
    assert r1.shape == r2.shape == (*(1,) * (x.ndim - 3), x.shape[-3], 1, x.shape[-1])


@_reference
def npu_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Any = None) -> Tensor:
    assert rotary_mode == "half"
    assert rotate is None
    _check_cos_sin(x, r1, r2)
    first, second = x.chunk(2, -1)
    return x * r1 + torch.cat((-second, first), -1) * r2


@_reference
def npu_rotary_mul_backward(
    grad: Tensor, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    assert rotary_mode == "half"
    _check_cos_sin(grad, r1, r2)
    first, second = (grad * r2).chunk(2, -1)
    return grad * r1 + torch.cat((second, -first), -1), torch.zeros(0), torch.zeros(0)


def _attention(q: Tensor, k: Tensor, v: Tensor, ends: tuple[list[int], list[int]], scale: float, mode: int) -> Tensor:
    """Dense attention, segment by segment, in layout TND."""
    precise = torch.promote_types(q.dtype, torch.float32)
    repeat, outputs, start_q, start_k = q.shape[1] // k.shape[1], [], 0, 0
    assert len(ends[0]) == len(ends[1]) <= 1024
    assert ends[0][-1] == len(q)
    assert ends[1][-1] == len(k)
    for end_q, end_k in zip(*ends, strict=True):
        query = q[start_q:end_q].to(precise)
        key, value = (x[start_k:end_k].to(precise).repeat_interleave(repeat, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        if mode == 3:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + len(key) - len(query))
            assert not hidden.all(-1).any()
            scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
        start_q, start_k = end_q, end_k
    return torch.cat(outputs).to(q.dtype)


def _check_mask(mask: Tensor | None, mode: int) -> None:
    assert mode in (0, 3)
    assert (mode == 3) == (mask is not None)
    if mask is not None:
        assert torch.equal(mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))


@_reference
def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *rest: Any, **options: Any
) -> tuple[Any, ...]:
    names = "pse padding_mask atten_mask scale keep_prob pre_tockens next_tockens inner_precise prefix actual_seq_qlen"
    names += " actual_seq_kvlen sparse_mode"
    given = {**dict(zip(names.split(), rest, strict=False)), **options}
    assert input_layout == "TND"
    assert head_num == query.shape[1]
    _check_mask(given.get("atten_mask"), given.get("sparse_mode", 0))
    ends = (given["actual_seq_qlen"], given["actual_seq_kvlen"])
    output = _attention(query, key, value, ends, given.get("scale", 1.0), given.get("sparse_mode", 0))
    statistics = torch.zeros(*query.shape[:2], 8)
    return output, statistics, statistics, torch.empty(0), 0, 0, 0


@_reference
def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    assert options["input_layout"] == "TND"
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert query.shape[-1] == value.shape[-1] == 128
    assert all(x.is_contiguous() for x in (query, key, value))
    assert (options["num_heads"], options["num_key_value_heads"]) == (query.shape[1], key.shape[1])
    _check_mask(options.get("atten_mask"), options.get("sparse_mode", 0))
    ends = (options["actual_seq_lengths"], options["actual_seq_lengths_kv"])
    output = _attention(query, key, value, ends, options["scale"], options.get("sparse_mode", 0))
    return output.detach(), torch.zeros(1)


@_reference
def npu_grouped_matmul(x: list[Tensor], weight: list[Tensor], **options: Any) -> list[Tensor]:
    (rows,), (matrices,), counts = x, weight, options["group_list"]
    assert counts.dtype == torch.int64
    assert options["group_list_type"] == 1
    if options["group_type"] == 0:
        assert options["split_item"] == 2
        assert rows.is_contiguous()
        assert int(counts.sum()) == len(rows)
        pieces = rows.split(counts.tolist())
        return [torch.cat([piece @ matrix for piece, matrix in zip(pieces, matrices, strict=True)]).detach()]
    assert options["group_type"] == 2
    assert options["split_item"] == 3
    assert rows.t().is_contiguous()
    pairs = zip(rows.split(counts.tolist(), 1), matrices.split(counts.tolist()), strict=True)
    return [torch.stack([left @ right for left, right in pairs]).detach()]


@_reference
def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    assert not padded_mode
    assert num_out_tokens is None
    order = indices.flatten().argsort(stable=True)
    return tokens[order // indices.shape[1]], order.argsort().int()


@_reference
def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> Tensor:
    assert not padded_mode
    assert sorted_indices.dtype == torch.int32
    if probs is None:
        return permuted_tokens[sorted_indices.long()]
    assert probs.dtype == permuted_tokens.dtype
    rows = permuted_tokens[sorted_indices.long()].unflatten(0, probs.shape)
    return (rows * probs.unsqueeze(-1)).sum(1)


def _define() -> None:
    """Define the operations, once per process."""
    if hasattr(torch.ops.npu, "npu_rms_norm"):
        return
    for line in committed(VERSION):
        name = line.split("(", 1)[0]
        if name in _references:
            torch.library.define(f"npu::{name}", line[len(name) :])
            torch.library.impl(f"npu::{name}", "CompositeImplicitAutograd", _references[name])


_define()
