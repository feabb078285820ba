"""The weighted loss of a linear head against the losses that hold all logits, and torch's own without them.

`python tests/benchmarks/bench_losses.py [--hidden N ...] [--classes N ...] [--ignored X ...] [--types NAME ...]
[--losses NAME ...] [--tokens N] [--repeats N]` prints time and peak memory of forward and backward, for 2,048 tokens
unless another number is asked for, as multiples of ours. Ours has weights for every token and sample; the others
compute the plain mean unless their name says so. Losses and gradients are first compared with float64. Memory is that
of tensors beyond the inputs and their gradients, as the profiler counts it.
"""

import argparse
from collections.abc import Callable

import torch
from timing import compare, machine_line, print_table, ratios
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

from vlparts.losses.cross_entropy import weighted_cross_entropy
from vlparts.losses.linear_cross_entropy import linear_weighted_cross_entropy

TOKENS, SAMPLES = 2048, 8
OURS = "ours"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def transformers_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss of transformers' models: all logits, in float32."""
    logits = F.linear(hidden, weight)
    return ForCausalLMLoss(logits, None, vocab_size=len(weight), shift_labels=labels)


def supervised_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same for labelled tokens only."""
    kept = labels != -100
    return transformers_loss(hidden[kept], weight, labels[kept])


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own loss of a linear head with its best options."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy="compact")
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


def torch_weighted(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own loss of a linear head with token weights."""
    losses = F.linear_cross_entropy(hidden, weight, labels, reduction="none")
    weights = (labels != -100).float()
    return (losses.float() * weights / weights.sum()).sum()


def weighted_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Our form for logits, with the same weights as ours."""
    return weighted_cross_entropy(F.linear(hidden, weight), labels, **weighting(labels))


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours, with weights of samples and tokens, mixed."""
    return linear_weighted_cross_entropy(hidden, weight, labels, **weighting(labels))


def weighting(labels: Tensor) -> dict[str, object]:
    """Random weights of all samples and tokens."""
    generator = torch.Generator().manual_seed(1)
    return {
        "sample_weights": torch.rand(SAMPLES, generator=generator, device="cpu").to(labels.device) + 0.5,
        "token_weights": torch.rand(len(labels), generator=generator, device="cpu").to(labels.device) + 0.5,
        "cu_seqlens": torch.linspace(0, len(labels), SAMPLES + 1, device=labels.device).int(),
        "mix": 0.5,
    }


RIVALS: dict[str, Loss] = {
    OURS: ours,
    "transformers": transformers_loss,
    "transformers, labelled rows only": supervised_rows,
    "torch linear_cross_entropy": torch_chunked,
    "the same with weights": torch_weighted,
    "ours on logits": weighted_logits,
}


def make_inputs(
    hidden: int, classes: int, ignored: float, dtype: torch.dtype, tokens: int = TOKENS
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels; the start of each sample is ignored, as a prompt is."""
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    weight = (torch.randn(classes, hidden) / hidden**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (tokens,)).view(SAMPLES, -1)
    labels[:, : round(ignored * labels.shape[1])] = -100
    return states, weight, labels.flatten()


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward, as a call."""

    def run() -> tuple[Tensor, ...]:
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs[:2])

    return run


def check(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compare the plain means with float64, and the weighted losses with the loss of float64 logits."""
    exact = tuple(x.detach().double().requires_grad_() for x in inputs[:2])
    for names, oracle in ((list(RIVALS)[1:5], supervised_rows), ([OURS, "ours on logits"], weighted_logits)):
        wanted = step(oracle, (*exact, inputs[2]))()
        for name in names:
            check_results(name, step(RIVALS[name], inputs)(), wanted)


def check_results(name: str, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Compare a loss and its gradients with those of float64."""
    for got, right in zip(found, wanted, strict=True):
        error = float((got.double() - right).norm() / right.norm())
        if not error <= TOLERANCES[found[1].dtype]:  # not a number is an error too
            raise RuntimeError(f"{name} is off by {error:.1e}")


def taken(run: Callable[[], tuple[Tensor, ...]], inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Peak MiB of tensors beyond the inputs and their gradients."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as record:
        run()
    held = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    gradients = sum(x.numel() * x.element_size() for x in inputs[:2])
    return (peak - gradients) / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[896])
    parser.add_argument("--classes", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--ignored", type=float, nargs="+", default=[0.3])
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"a multiple of {SAMPLES}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--losses", nargs="+", default=list(RIVALS), choices=list(RIVALS), help="beside ours")
    options = parser.parse_args()
    print(machine_line())
    for name in options.types:
        for hidden in options.hidden:
            for classes in options.classes:
                for ignored in options.ignored:
                    inputs = make_inputs(hidden, classes, ignored, TYPES[name], options.tokens)
                    setting = f"{name}, {options.tokens:,} tokens, {hidden} x {classes:,}, {ignored:.0%} ignored"
                    if hidden * classes <= 896 * 32_000:
                        check(inputs)
                    calls = {
                        rival: step(RIVALS[rival], inputs) for rival in RIVALS if rival in (OURS, *options.losses)
                    }
                    seconds = compare(calls, options.repeats)
                    memory = {rival: taken(call, inputs) for rival, call in calls.items()}
                    rows = [
                        [setting, rival, seconds[rival], ratio, f"{memory[rival]:.0f}", memory[rival] / memory[OURS]]
                        for rival, ratio in ratios(seconds, OURS).items()
                    ]
                    print_table(["setting", "loss", "seconds", "times ours", "MiB", "times ours"], rows)


if __name__ == "__main__":
    main()
