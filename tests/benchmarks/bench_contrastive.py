"""Contrastive losses in blocks against the same losses on the whole matrix of logits.

`python tests/benchmarks/bench_contrastive.py [--quick] [--pairs N ...] [--repeats N]` prints, for 1,024 to 16,384
pairs of width 256, in float32 and bfloat16, the time and the peak memory of forward and backward, and their multiples
for other chunk sizes and the plain losses. Before anything is timed, loss and gradients are compared with the plain
loss in float64 (up to 4,096 pairs). Memory is what tensors took beyond the inputs, as the profiler counts it.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timing import compare, machine_line, print_table, ratios
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from vlparts.parts.dual_encoder_loss import DEFAULT_CHUNK_SIZE, sigmoid_contrastive_loss, softmax_contrastive_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WIDTH = 256
CHECKED_PAIRS = 4096
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def plain_softmax(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """CLIP's loss as transformers and open_clip write it; the bias is not used."""
    logits = scale.to(images.dtype) * images @ texts.T
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def plain_sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss as transformers writes it."""
    logits = scale.to(images.dtype) * images @ texts.T + bias.to(images.dtype)
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - torch.ones_like(logits)
    return -F.logsigmoid(signs * logits).sum(-1).mean()


def chunked_softmax(chunk_size: int, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Ours; the bias is not used."""
    return softmax_contrastive_loss(images, texts, scale, chunk_size=chunk_size)


def chunked_sigmoid(chunk_size: int, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Ours."""
    return sigmoid_contrastive_loss(images, texts, scale, bias, chunk_size=chunk_size)


def in_float32(loss: Loss, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """A plain loss whose logits are as precise as ours."""
    return loss(images.float(), texts.float(), scale, bias)


def make_inputs(pairs: int, dtype: torch.dtype) -> list[Tensor]:
    """Features of pairs that fit each other a little, of length one; a scale and a bias."""
    images = torch.randn(pairs, WIDTH)
    texts = images + 2 * torch.randn(pairs, WIDTH)
    features = [F.normalize(x, dim=-1).to(dtype) for x in (images, texts)]
    return [x.requires_grad_() for x in (*features, torch.tensor(20.0), torch.tensor(-10.0))]


def step(loss: Loss, tensors: Sequence[Tensor]) -> list[Tensor]:
    """One pass forward and backward: the loss and the gradients of the features."""
    value = loss(*tensors)
    return [value, *torch.autograd.grad(value, tensors[:2])]


def check(losses: dict[str, Loss], reference: Loss, tensors: list[Tensor], pairs: int) -> None:
    """Stop if ours disagrees with the plain loss in float64 by more than the type's rounding."""
    if pairs > CHECKED_PAIRS:
        return
    expected = step(reference, [x.detach().double().requires_grad_() for x in tensors])
    for name, loss in losses.items():
        for got, wanted in zip(step(loss, tensors), expected, strict=True):
            error = ((got.double() - wanted).norm() / wanted.norm()).item()
            if not error < TOLERANCES[tensors[0].dtype]:
                raise SystemExit(f"{name} is off by {error:.1e} in {tensors[0].dtype}: nothing was timed")


def peak_bytes(run: Callable[[], object]) -> int:
    """Largest sum of what was allocated and not yet freed while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(pairs: int, dtype: torch.dtype, repeats: int) -> list[list[object]]:
    """Two rows of the table: softmax and sigmoid."""
    tensors = make_inputs(pairs, dtype)
    rows: list[list[object]] = []
    for kind, ours, plain in (
        ("softmax", chunked_softmax, plain_softmax),
        ("sigmoid", chunked_sigmoid, plain_sigmoid),
    ):
        blocks = {f"blocks of {size}": partial(ours, size) for size in (DEFAULT_CHUNK_SIZE, 256)}
        check(blocks, plain, tensors, pairs)
        losses = {**blocks, "plain": plain, "plain, logits in float32": partial(in_float32, plain)}
        runs = {name: partial(step, loss, tensors) for name, loss in losses.items()}
        seconds, memory = compare(runs, repeats), {name: peak_bytes(run) for name, run in runs.items()}
        base = next(iter(runs))
        times, sizes = ratios(seconds, base), ratios({name: float(size) for name, size in memory.items()}, base)
        row = [f"{kind}, {pairs}, {str(dtype).removeprefix('torch.')}"]
        row += [f"{seconds[base] * 1e3:.0f} ms, {memory[base] / 2**20:.1f} MiB"]
        row += [f"{times[name]:.2f}, {sizes[name]:.2f}" for name in list(runs)[1:]]
        rows.append(list(row))
    return rows


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,024 pairs only, few repeats")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1024, 4096, 16384], help="numbers of pairs")
    parser.add_argument("--repeats", type=int, default=None, help="rounds; 5, or 3 with --quick")
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.quick else 5)
    torch.manual_seed(0)
    print(machine_line())
    print(f"width {WIDTH}; forward and backward; medians of {repeats}; time, peak memory\n")
    rows = [
        row
        for pairs in ([1024] if options.quick else options.pairs)
        for dtype in (torch.float32, torch.bfloat16)
        for row in measure(pairs, dtype, repeats)
    ]
    rivals = [f"blocks of {DEFAULT_CHUNK_SIZE}", "blocks of 256", "plain", "plain, logits in float32"]
    print_table(["loss, pairs, type", *rivals], rows)


if __name__ == "__main__":
    main()
