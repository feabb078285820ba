"""Experts implementations on one MoE layer: ours against transformers'.

`python tests/benchmarks/bench_experts.py` prints, per layer, dtype, pass and number of tokens, the time of each
implementation as a multiple of the fastest of transformers', and a lower limit: the time to read the weights of the
chosen experts, in training also to write their gradients, at this machine's memory copy speed. With `--rotate 3` a run
passes through three layers with weights and routings of their own, as in a model, so that few weights are still in the
cache; times are per layer. `--launches` prints the number of operations of a call instead.
"""

import argparse
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from timing import compare, machine_line, print_table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import vlparts.moe  # noqa: F401 (registers the implementations)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Width, experts, experts per token, intermediate size, groups with equal numbers of chosen experts.
LAYERS = {
    "DeepSeek-OCR": (1280, 64, 6, 896, 1),
    "Pangu Pro MoE / 8": (640, 64, 8, 168, 8),
    "Pangu Pro MoE": (5120, 64, 8, 1344, 8),
    "tiny": (32, 8, 2, 16, 1),
}
THEIRS = ("eager", "grouped_mm", "batched_mm")
OURS = ("vlparts_sorted", "vlparts_merged", "vlparts_auto")
MOST_COPIES = 2**31  # bytes that `batched_mm` may copy
MOST_MERGED = 512  # tokens that `vlparts_merged` is timed with
MOST_EAGER = 1  # tokens that "eager" is timed with in training, where it takes 30 times as long as the others


def layer(name: str, dtype: torch.dtype) -> nn.Module:
    """The experts of one layer in transformers' layout."""
    width, experts, k, inner, _ = LAYERS[name]
    config = Qwen3MoeConfig(hidden_size=width, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=k)
    module = Qwen3MoeExperts(config).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def routing(name: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, indices of experts, and weights."""
    width, experts, k, _, groups = LAYERS[name]
    scores = torch.rand(tokens, groups, experts // groups)
    index = scores.topk(k // groups, -1).indices + torch.arange(groups)[:, None] * (experts // groups)
    return torch.randn(tokens, width).to(dtype), index.flatten(1), torch.rand(tokens, k).to(dtype)


def run_of(
    modules: list[nn.Module], implementation: str, arguments: list[tuple[Tensor, ...]], trains: bool
) -> Callable[[], Tensor]:
    """A call of each layer with its own arguments, or calls and their backward passes; returns the last output."""

    def forward() -> Tensor:
        with torch.no_grad():
            for module, (hidden, index, weights) in zip(modules, arguments, strict=True):
                module.config._experts_implementation = implementation
                output = module(hidden, index, weights)
        return output

    def training() -> Tensor:
        for module, (hidden, index, weights) in zip(modules, arguments, strict=True):
            module.config._experts_implementation = implementation
            inputs = hidden.clone().requires_grad_()
            output = module(inputs, index, weights)
            torch.autograd.grad(output, [inputs, *module.parameters()], torch.ones_like(output))
        return output

    return training if trains else forward


def copy_speed(numbers: int = 2**26) -> float:
    """Bytes per second of large memory copies, reads and writes together."""
    source = torch.ones(numbers)
    target = torch.empty_like(source)
    seconds = compare({"copy": lambda: target.copy_(source)}, 5)["copy"]
    return 2 * source.numel() * source.element_size() / seconds


def moved_bytes(module: nn.Module, hit: float, trains: bool) -> float:
    """Least bytes of a call: weights of the experts that are hit, twice in training, and gradients of all experts."""
    everything = sum(one.numel() * one.element_size() for one in module.parameters())
    return hit / len(module.gate_up_proj) * everything * (2 if trains else 1) + everything * trains


def measure(arguments: argparse.Namespace) -> None:
    """Print the row of each setting as soon as it is measured."""
    names = [*THEIRS, *OURS]
    passes = [one == "training" for one in arguments.passes]
    for name, dtype, trains in product(arguments.layers, arguments.types, passes):
        modules = [layer(name, DTYPES[dtype]) for _ in range(arguments.rotate)]
        bytes_of_expert = sum(one[0].numel() * one.element_size() for one in modules[0].parameters())
        for tokens in arguments.tokens:
            inputs = [routing(name, tokens, DTYPES[dtype]) for _ in modules]
            hit = sum(len(index.unique()) for _, index, _ in inputs) / len(modules)
            runs = {one: run_of(modules, one, inputs, trains) for one in names}
            if inputs[0][1].numel() * bytes_of_expert > MOST_COPIES:
                del runs["batched_mm"]
            if tokens > MOST_MERGED:
                del runs["vlparts_merged"]
            if trains and tokens > MOST_EAGER:
                del runs["eager"]
            check(runs)
            speed = copy_speed()
            seconds = {one: time / len(modules) for one, time in compare(runs, arguments.repeats).items()}
            best = min(seconds[one] for one in THEIRS if one in seconds)
            moved = moved_bytes(modules[0], hit, trains)
            label = f"{name}, {'training' if trains else 'inference'}, {dtype}, {tokens} tokens"
            cells = [seconds[one] / best if one in seconds else "" for one in names]
            print_table(
                ["setting", "experts hit", "limit, ms", "best of transformers', ms", *names],
                [[label, round(hit), moved / speed * 1e3, best * 1e3, *cells]],
            )


def check(runs: dict[str, Callable[[], Tensor]]) -> None:
    """Check that all give the same outputs."""
    outputs = {name: run().detach().float() for name, run in runs.items()}
    for output in outputs.values():
        torch.testing.assert_close(output, outputs["grouped_mm"], atol=0.1, rtol=0.1)


class Launches(TorchDispatchMode):
    """Counts operations other than views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Run and count."""
        result = operation(*arguments, **(options or {}))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if not (isinstance(first, Tensor) and first._is_view()):
            self.count += 1
        return result


def launches(arguments: argparse.Namespace) -> None:
    """Print the number of operations of a call, each of which is a kernel launch on an accelerator."""
    rows = []
    for name in arguments.layers:
        module = layer(name, torch.bfloat16)
        for tokens in (1, 64):
            counts = []
            for one in ("eager", "grouped_mm", "vlparts_merged"):
                run = run_of([module], one, [routing(name, tokens, torch.bfloat16)], False)
                with Launches() as counter:
                    run()
                counts.append(counter.count)
            rows.append([f"{name}, {tokens} tokens", *counts])
    print_table(["layer", "eager", "grouped_mm", "vlparts_merged"], rows)


def main() -> None:
    """Print the requested tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median is printed")
    parser.add_argument("--types", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--layers", nargs="+", default=list(LAYERS)[:2], choices=list(LAYERS), metavar="LAYER")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512, 4096])
    parser.add_argument("--passes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument("--rotate", type=int, default=1, help="layers with weights of their own in a run")
    parser.add_argument("--launches", action="store_true", help="print only numbers of operations")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(machine_line())
    launches(arguments) if arguments.launches else measure(arguments)


if __name__ == "__main__":
    main()
