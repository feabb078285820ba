"""Packed attention against what a user would write instead, on one machine in one run.

`python tests/benchmarks/bench_attention.py [--quick]` prints times as multiples of that of `packed_attention`.
All candidates must agree, forward and backward, before any is timed.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import compare, machine_line, print_table, ratios
from torch import Tensor

from vlparts.parts.ops_attention import packed_attention
from vlparts.parts.ops_attention_reference import block_mask
from vlparts.parts.packed_index import get_max_seqlen

HEADS, CHANNELS = 8, 64
CASES = [(1024, 16), (4096, 16), (4096, 64)]
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def mixed_lengths(tokens: int, segments: int) -> list[int]:
    """Lengths between about a quarter and seven quarters of the mean, with the given sum."""
    draws = torch.rand(segments, generator=torch.Generator().manual_seed(0)) * 1.5 + 0.25
    ends = (draws.cumsum(0) / draws.sum() * tokens).round().long()
    return ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()


def loop(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """One call of SDPA for each segment."""
    parts = [x.transpose(0, 1)[None].split(lengths, dim=2) for x in (query, key, value)]
    outputs = [F.scaled_dot_product_attention(*part).transpose(1, 2) for part in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=1)[0]


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """One call of SDPA with a boolean mask over all pairs; the mask is made beforehand."""
    output = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (query, key, value)), attn_mask=mask)
    return output[0].transpose(0, 1).contiguous()


def padded(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], real: Tensor) -> Tensor:
    """Every segment padded to the longest, in one batch with a mask of keys."""
    padded_inputs = [
        torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2)
        for x in (query, key, value)
    ]
    output = F.scaled_dot_product_attention(*padded_inputs, attn_mask=real[:, None, None])
    return output.transpose(1, 2)[real]


def rivals(lengths: list[int]) -> dict[str, Attention]:
    """All candidates for these segments, with all prepared that a model prepares once for all layers."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest, total = get_max_seqlen(cu_seqlens), sum(lengths)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return {
        "packed_attention": partial(
            packed_attention, cu_seqlens_q=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest
        ),
        "loop of SDPA": partial(loop, lengths=lengths),
        "dense boolean mask": partial(dense, mask=block_mask(cu_seqlens, cu_seqlens, total, total, False)),
        "padded batch": partial(padded, lengths=lengths, real=real),
    }


def forward(attention: Attention, tensors: list[Tensor]) -> Tensor:
    """One pass without gradients."""
    with torch.no_grad():
        return attention(*tensors)


def forward_backward(attention: Attention, tensors: list[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    """One pass with the gradients of all three inputs."""
    return torch.autograd.grad(attention(*tensors), tensors, direction)


def check(candidates: dict[str, Attention], tensors: list[Tensor], direction: Tensor) -> None:
    """Stop if a candidate disagrees with the loop in float64 by more than the type's rounding."""
    exact = [x.detach().double().requires_grad_() for x in tensors]
    reference = candidates["loop of SDPA"]
    expected = [forward(reference, exact), *forward_backward(reference, exact, direction.double())]
    for name, attention in candidates.items():
        got = [forward(attention, tensors), *forward_backward(attention, tensors, direction)]
        for a, b in zip(got, expected, strict=True):
            error = ((a.double() - b).norm() / b.norm()).item()
            if not error < TOLERANCES[a.dtype]:
                raise SystemExit(f"{name} is off by {error:.1e} in {a.dtype}: nothing was timed")


def measure(tokens: int, segments: int, dtype: torch.dtype, repeats: int) -> list[list[object]]:
    """Two table rows: forward, and forward with backward."""
    candidates = rivals(mixed_lengths(tokens, segments))
    tensors = [torch.randn(tokens, HEADS, CHANNELS, dtype=dtype, requires_grad=True) for _ in range(3)]
    direction = torch.randn(tokens, HEADS, CHANNELS, dtype=dtype)
    check(candidates, tensors, direction)
    passes = {
        "forward": {n: partial(forward, f, tensors) for n, f in candidates.items()},
        "forward + backward": {n: partial(forward_backward, f, tensors, direction) for n, f in candidates.items()},
    }
    rows: list[list[object]] = []
    for label, functions in passes.items():
        seconds = compare(functions, repeats)
        base = "packed_attention"
        relative = ratios(seconds, base)
        case = f"{tokens}, {segments}, {str(dtype).removeprefix('torch.')}"
        rows.append([case, label, f"{seconds[base] * 1e3:.2f} ms", *list(relative.values())[1:]])
    return rows


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest case only, few repeats")
    parser.add_argument("--repeats", type=int, default=None, help="rounds; 15, or 3 with --quick")
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.quick else 15)
    torch.manual_seed(0)
    print(machine_line())
    print(f"{HEADS} heads of {CHANNELS} channels; medians of {repeats}; multiples of packed_attention\n")
    rows = [
        row
        for tokens, segments in (CASES[:1] if options.quick else CASES)
        for dtype in (torch.float32, torch.bfloat16)
        for row in measure(tokens, segments, dtype, repeats)
    ]
    print_table(["tokens, segments, type", "pass", "packed_attention", *list(rivals([1]))[1:]], rows)


if __name__ == "__main__":
    main()
