"""Attention within packed segments on CPU: segments of equal length are batched, nothing is padded.

Shapes: `Lq` queries and `Lk` keys of all segments; `H` query heads, `Hkv` key heads; `D` channels of queries and keys,
`Dv` of values; `B` segments of a batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...parts.ops_attention_reference import SegmentRun, attend, segment_lengths, segment_runs, zeros_like_output
from ...parts.utils import refuse_second_derivative
from .attention_blocks import append_mean, attend_in_blocks, blocks_apply
from .calibration import Trial, fastest_form
from .linear import is_allowed

# Segments up to this length are copied into one batch with others of equal length. Copied, eight segments take this
# share of the time of eight calls, forward (8 heads of 64 channels, 2 cores of a Zen 5, a shared machine): 0.7 to 0.8
# at 8 or 16 tokens, about 0.87 at 32, no clear gain from 64 up. Neighbours of equal length need no copy and are
# batched at every length.
BATCH_UP_TO = 32

# In bfloat16 training, segments up to this length may go through `_BFloat16Attention` (table in `_attend`). Its
# Lq * Lk weights per head stay in memory until the backward pass.
BFLOAT16_TRAINING_UP_TO = 512

# Lengths that are measured: that of a segment is rounded down to a power of two in this range. From the last one on
# the ratios hardly change.
MEASURED_LENGTHS = (64, 1024)

# Largest number of scores that `_BFloat16Attention` computes at once, 8 MiB: the fastest, or equal, of bounds from 1
# to 8 MiB.
SCORES_PER_CHUNK = 2**21


def packed_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
    cu_seqlens_q_cpu: Sequence[int] | None = None,
    cu_seqlens_k_cpu: Sequence[int] | None = None,
) -> Tensor:
    """CPU kernel of `vlparts::varlen_attention`; arguments and result are those of [`packed_attention_reference`]."""
    lengths_q = segment_lengths(cu_seqlens_q, query.shape[0], "cu_seqlens_q", cu_seqlens_q_cpu)
    lengths_k = segment_lengths(cu_seqlens_k, key.shape[0], "cu_seqlens_k", cu_seqlens_k_cpu)
    runs = segment_runs(lengths_q, lengths_k)
    queries = _split_heads_first(query, [run.segments * run.length_q for run in runs])
    keys = _split_heads_first(key, [run.segments * run.length_k for run in runs])
    values = _split_heads_first(value, [run.segments * run.length_k for run in runs])
    outputs: dict[int, Tensor] = {}
    for batch in _batches(runs):
        counts = [runs[i].segments for i in batch]
        q, k, v = (_join_runs([parts[i] for i in batch], sum(counts)) for parts in (queries, keys, values))
        output = _attend(q, k, v, scale, causal)
        outputs.update(zip(batch, output.split(counts) if len(counts) > 1 else (output,), strict=True))
    return _join_segments([outputs[i] for i in range(len(runs))], query, value)


def _batches(runs: Sequence[SegmentRun]) -> list[list[int]]:
    """Indices of the runs that are computed as one batch: short ones of equal lengths, or one long run."""
    batches: dict[tuple[int, ...], list[int]] = {}
    for index, (_, length_q, length_k) in enumerate(runs):
        alone = index if max(length_q, length_k) > BATCH_UP_TO else -1
        batches.setdefault((length_q, length_k, alone), []).append(index)
    return list(batches.values())


def _join_runs(parts: list[Tensor], count: int) -> Tensor:
    """Reshape runs `(1, H, segments * length, D)` of one length to `(count, H, length, D)`."""
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return joined if count == 1 else joined[0].unflatten(1, (count, -1)).transpose(0, 1)


def _split_heads_first(tokens: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Split `(L, H, D)` into views `(1, H, length, D)`, the layout of SDPA."""
    return tokens.transpose(0, 1).unsqueeze(0).split(lengths, dim=2)


def _join_segments(outputs: list[Tensor], query: Tensor, value: Tensor) -> Tensor:
    """Concatenate outputs `(B, H, length, Dv)` to `(L, H, Dv)`."""
    if not outputs:
        return zeros_like_output(query, value)
    rows = [
        output.transpose(1, 2) if len(output) == 1 else output.transpose(1, 2).flatten(0, 1)[None]
        for output in outputs
    ]
    return rows[0][0].contiguous() if len(rows) == 1 else torch.cat(rows, dim=1)[0]


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Attention of `(B, H, Lq, D)` by the fastest form for these inputs on this processor.

    Times relative to fused SDPA, by length of the segments (6 heads of 64 channels), on one thread of a Zen 5 and on
    two cores of an Intel Xeon with AMX:

    | length                                 |   64 |  128 |  256 |  384 |  512 |  768 | 1024 | 2048 |
    |----------------------------------------|------|------|------|------|------|------|------|------|
    | Zen 5, float32, blocks                 | 2.98 | 1.36 | 0.99 | 0.66 | 0.64 | 0.60 | 0.61 | 0.58 |
    | Zen 5, float32, blocks, training       | 3.32 | 1.69 | 1.07 | 0.80 | 0.68 | 0.80 | 0.71 | 0.65 |
    | Zen 5, bfloat16, blocks                | 2.50 | 1.27 | 0.90 | 0.69 | 0.66 | 0.55 | 0.56 | 0.54 |
    | Zen 5, bfloat16, blocks, training      | 2.33 | 0.93 | 0.82 | 0.74 | 0.68 | 0.62 | 0.69 | 0.64 |
    | Zen 5, bfloat16, kept weights          | 0.63 | 0.40 | 0.50 | 0.50 | 0.52 | 0.57 | 1.19 |      |
    | Xeon, float32, blocks                  |      | 9.4  | 4.7  | 2.7  | 2.1  | 1.6  | 1.4  | 1.2  |
    | Xeon, bfloat16, blocks                 |      | 9.7  | 7.6  | 6.0  | 5.1  | 3.2  | 3.3  | 3.1  |
    | Xeon, bfloat16, kept weights, training | 1.11 | 0.80 | 0.99 | 1.35 | 1.47 | 1.69 | 1.87 |      |
    """
    if not causal:
        form = _form_of(query, key, value)
        if form == "explicit":
            return _attend_explicitly(query, key, value, scale)
        if form == "blocks":
            return attend_in_blocks(query, key, value, scale)
    return attend(query, key, value, scale, causal)


def _form_of(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Which form is the fastest for full attention of these inputs: "fused", "blocks" or "explicit"."""
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    names = ["fused"]
    if blocks_apply(query, key, value):
        names.append("blocks")
    lengths = query.shape[2], key.shape[2]
    # Segments without queries or keys have no weights.
    if trains and query.dtype == torch.bfloat16 and min(lengths) > 0 and max(lengths) <= BFLOAT16_TRAINING_UP_TO:
        names.append("explicit")
    if len(names) == 1 or not is_allowed(query.dtype):
        return "fused"
    shortest, longest = MEASURED_LENGTHS
    length = min(max(1 << (max(lengths).bit_length() - 1), shortest), longest)
    name = f"{str(query.dtype).removeprefix('torch.')} attention{', training' * trains}, {length} tokens, {names[-1]}"
    return fastest_form(name, names, lambda: _make_trials(query.dtype, length, trains, names))


def _make_trials(dtype: torch.dtype, length: int, trains: bool, names: Sequence[str]) -> dict[str, Trial]:
    """A call of each form on segments of this length, with a head of 64 channels for each thread and at least six."""
    heads = max(6, torch.get_num_threads())
    with torch.inference_mode(False):
        qkv = torch.linspace(-1, 1, 3 * length * heads * 64).view(length, 3, heads, 64).to(dtype)
        grad = torch.ones(1, length, heads, 64, dtype=dtype).transpose(1, 2)

    def run(attend_by: Callable[..., Tensor]) -> None:
        with torch.inference_mode(False), torch.set_grad_enabled(trains):
            given = qkv.detach().requires_grad_(trains)
            output = attend_by(*given.transpose(0, 2)[None].unbind(2), None)
            if trains:
                torch.autograd.grad(output, given, grad)

    forms = {"fused": _attend_fused, "blocks": attend_in_blocks, "explicit": _attend_explicitly}
    return {name: partial(run, forms[name]) for name in names}


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    return attend(query, key, value, scale, causal=False)


def _attend_explicitly(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attention of `(B, H, Lq, D)` by `_BFloat16Attention`, in chunks of segments."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    size = max(1, SCORES_PER_CHUNK // (query.shape[1] * query.shape[2] * key.shape[2]))
    chunks = zip(query.split(size), key.split(size), value.split(size), strict=True)
    outputs = [_BFloat16Attention.apply(*chunk, scale)[0] for chunk in chunks]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _BFloat16Attention(torch.autograd.Function):
    """Full attention with explicit weights and a bfloat16 backward pass, for short segments.

    As in fused kernels, scores and softmax are float32, and the weights are rounded to bfloat16 before they multiply
    the values.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            scores = (query.float() * scale) @ key.float().transpose(-1, -2)
        weights = scores.softmax(-1).to(value.dtype)
        return weights @ value, weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("Packed attention in bfloat16 is")
        if grad is None:
            return None, None, None, None
        query, key, value, output, weights = ctx.saved_tensors
        grad_value = weights.transpose(-1, -2) @ grad
        extended_grad, extended_value = append_mean(grad, output, value)
        grad_scores = (extended_grad @ extended_value.transpose(-1, -2)).mul_(weights)
        grad_query = (grad_scores @ key).mul_(ctx.scale)
        grad_key = (grad_scores.transpose(-1, -2) @ query).mul_(ctx.scale)
        return grad_query, grad_key, grad_value, None
