"""The library on a CUDA GPU, written for one NVIDIA H200, against what else there is.

`python tests/benchmarks/bench_gpu.py` prints a Markdown table for each part: encoders, experts, losses of a head, a
training step of a whole model, decoding, and the errors of packed attention. A cell is the median of rounds in which
all rivals take turns, with its multiple of ours; a rival that fails has the reason in its cell. Times are those of
synchronised calls, memory is the peak above what is held before the call. The share of the device's peak is that of
the operations, or of the bytes that must be moved, over the rates of a large product and a large copy in the same run.
`--device cpu --tiny` tries the benchmark on a CPU.
"""

import argparse
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import gpu_rivals
import torch
from bench_experts import OURS, THEIRS, layer, routing
from bench_losses import TYPES, make_inputs
from encoder_rivals import setting
from gpu_measure import Machine, Run, Trial, cells, describe, measure_machine, race, rows_of
from gpu_rivals import MODELS, Shape
from timing import print_table

SEED = 0
EXPERTS = (*reversed(OURS), *THEIRS)  # `vlparts_auto` first
Rows = Iterator[list[str]]  # of a table, its header first


class Scale(NamedTuple):
    """What is measured."""

    sizes: tuple[str, ...]  # of encoders
    images: tuple[int, ...]
    layers: tuple[str, ...]  # of experts
    rotate: int  # layers with weights of their own, called in a row
    tokens: tuple[int, ...]
    hidden: tuple[int, ...]  # widths of heads
    classes: tuple[int, ...]
    ignored: tuple[float, ...]
    labels: int
    shape: Shape
    samples: int
    length: int  # tokens of a sample
    grid: tuple[int, int]  # patches of its image
    batches: tuple[int, ...]  # samples that decode together
    answer: int  # tokens that are decoded
    segments: tuple[int, ...]
    heads: int
    widths: tuple[int, ...]
    side: int  # of the matrices whose product is the device's peak
    numbers: int  # that are copied


LARGE = Scale(
    sizes=("ViT-S", "ViT-B", "ViT-L"),
    images=(32, 256),
    layers=("DeepSeek-OCR", "Pangu Pro MoE"),
    rotate=4,
    tokens=(1, 2, 4, 8, 64, 512, 4096),
    hidden=(896, 3584),
    classes=(32_000, 151_936),
    ignored=(0, 0.3, 0.5, 0.9),
    labels=8192,
    shape=Shape(
        vision=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        text=dict(  # Qwen2.5-0.5B
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151_936,
        ),
    ),
    samples=8,
    length=1024,
    grid=(32, 32),
    batches=(1, 8),
    answer=128,
    segments=(1, 7, 64, 333, 577, 1024, 1024, 4096),
    heads=16,
    widths=(64, 128),
    side=8192,
    numbers=2**30,
)
TINY = Scale(
    sizes=("tiny",),
    images=(2,),
    layers=("tiny",),
    rotate=2,
    tokens=(1, 8),
    hidden=(32,),
    classes=(512,),
    ignored=(0, 0.5),
    labels=64,
    shape=Shape(
        vision=dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2),
        text=dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=256,
        ),
    ),
    samples=2,
    length=16,
    grid=(4, 4),
    batches=(1, 2),
    answer=3,
    segments=(1, 7, 16, 16),
    heads=2,
    widths=(64,),
    side=256,
    numbers=2**16,
)


class Bench(NamedTuple):
    """What is measured, where, and how often."""

    scale: Scale
    machine: Machine
    repeats: int

    def race(self, rivals: dict[str, Callable[[], Run]]) -> dict[str, Trial | str]:
        """Time rivals in turn, ours first; see [`gpu_measure.race`]."""
        return race(rivals, self.repeats, self.machine.device)


def encoders(bench: Bench) -> Rows:
    """Encoders of mixed images, bfloat16; the share leaves the norms and activations out."""
    rivals = gpu_rivals.encoders()
    yield header(rivals)
    for size, images, training in product(bench.scale.sizes, bench.scale.images, (False, True)):
        with bench.machine.device:
            one = setting(size, images, torch.bfloat16)
        outcomes = bench.race(
            {name: partial(gpu_rivals.encoder_run, make, one, training) for name, make in rivals.items()}
        )
        label = f"{size}, {images} images, {len(one.pixels)} patches, {kind_of(training)}"
        yield from rows_of(label, outcomes, bench.machine.share(outcomes, gpu_rivals.encoder_flops(one, training)))


def experts(bench: Bench) -> Rows:
    """Experts of layers with weights of their own, called in a row, bfloat16."""
    yield header(EXPERTS)
    for name, tokens, training in product(bench.scale.layers, bench.scale.tokens, (False, True)):
        with bench.machine.device:
            modules = [layer(name, torch.bfloat16) for _ in range(bench.scale.rotate)]
            inputs = [routing(name, tokens, torch.bfloat16) for _ in modules]
        arguments = (modules, inputs, training)
        outcomes = bench.race({one: partial(gpu_rivals.checked_experts, one, *arguments) for one in EXPERTS})
        label = f"{len(modules)} layers of {name}, {tokens} tokens, {kind_of(training)}"
        yield from rows_of(label, outcomes, bench.machine.share(outcomes, *gpu_rivals.experts_costs(name, *arguments)))


def losses(bench: Bench) -> Rows:
    """Loss of a linear head, forward and backward; ours has weights of tokens and samples."""
    rivals, scale = gpu_rivals.losses(), bench.scale
    yield header(rivals)
    for dtype, hidden, classes, ignored in product(TYPES, scale.hidden, scale.classes, scale.ignored):
        with bench.machine.device:
            inputs = make_inputs(hidden, classes, ignored, TYPES[dtype], scale.labels)
        outcomes = bench.race({name: partial(gpu_rivals.checked_loss, one, inputs) for name, one in rivals.items()})
        label = f"{dtype}, {scale.labels} tokens, {hidden} x {classes}, {ignored:.0%} ignored"
        flops = 6 * int((inputs[2] != -100).sum()) * hidden * classes
        yield from rows_of(label, outcomes, bench.machine.share(outcomes, flops, dtype=TYPES[dtype]))


def whole_models(bench: Bench) -> Rows:
    """Training step of a model (forward, backward, AdamW), with an image in each sample, bfloat16."""
    yield header(MODELS)
    shape, sizes = bench.scale.shape, (bench.scale.samples, bench.scale.length, bench.scale.grid)
    with bench.machine.device:
        batch = gpu_rivals.batch_of(shape, *sizes)
    outcomes = bench.race(
        {name: partial(gpu_rivals.training_run, make, shape, batch) for name, make in MODELS.items()}
    )
    flops = gpu_rivals.model_flops(shape, *sizes).total
    yield from rows_of(
        "{} x {} tokens, images of {} patches".format(*sizes), outcomes, bench.machine.share(outcomes, flops)
    )


def decoding(bench: Bench) -> Rows:
    """Decoding by `generate`, with an image in each prompt, bfloat16; the share leaves the cache out."""
    yield header(MODELS)
    scale = bench.scale
    for samples, tokens in product(scale.batches, (1, scale.answer)):
        sizes = (samples, scale.length, scale.grid)
        with bench.machine.device:
            batch = gpu_rivals.batch_of(scale.shape, *sizes)
        arguments = (scale.shape, batch, tokens)
        outcomes = bench.race(
            {name: partial(gpu_rivals.generating_run, make, *arguments) for name, make in MODELS.items()}
        )
        label = f"batch {samples}, prompt of {scale.length} tokens, {tokens} decoded"
        if tokens == 1:
            flops = gpu_rivals.model_flops(scale.shape, *sizes, head=False).forward
            yield from rows_of(label, outcomes, bench.machine.share(outcomes, flops))
        else:
            share = bench.machine.share(outcomes, moved=gpu_rivals.text_bytes(scale.shape) * tokens)
            yield from rows_of(label, outcomes, share, "tokens/s", partial(rate, samples * tokens))


def numerics(bench: Bench) -> Rows:
    """Relative root mean square errors of packed attention against float64; the last column is the kernel of ours."""
    scale = bench.scale
    yield ["setting", *gpu_rivals.ATTENTION, "kernel"]
    for dtype, width, causal in product((torch.bfloat16, torch.float16), scale.widths, (False, True)):
        arguments = (scale.segments, scale.heads, width, dtype, causal, bench.machine.device)
        errors, kernel = gpu_rivals.attention_errors(*arguments)
        for index, name in enumerate(("output", "gradient of query", "gradient of key", "gradient of value")):
            figures = {rival: one if isinstance(one, str) else one[index] for rival, one in errors.items()}
            yield [f"{dtype}, {width} channels{', causal' * causal}: {name}", *cells(figures), kernel]


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "encoders": encoders,
    "experts": experts,
    "loss": losses,
    "vlm": whole_models,
    "decoding": decoding,
    "numerics": numerics,
}


def header(rivals: Iterable[str]) -> list[str]:
    """Names of the columns."""
    return ["setting", *rivals, "share of the peak"]


def kind_of(training: bool) -> str:
    """What a call does."""
    return "forward and backward" if training else "forward"


def rate(count: int, one: Trial) -> float:
    """Things per second."""
    return count / one.seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each part; after the last, parts that failed end the command with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts; 1 with --tiny")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small sizes and one round, to try the benchmark")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device: nothing is measured. `--device cpu --tiny` tries the benchmark.")
        return
    scale, repeats = (TINY, 1) if options.tiny else (LARGE, options.repeats)
    machine = measure_machine(torch.device(options.device), scale.side, scale.numbers)
    bench, failed = Bench(scale, machine, repeats), []
    for name in options.parts:
        torch.manual_seed(SEED)
        print(f"\n{PARTS[name].__doc__}\n")
        try:
            rows = PARTS[name](bench)
            print_table(next(rows), rows)
        except Exception:  # the other parts are measured all the same
            traceback.print_exc()
            failed.append(name)
    print(f"\n{describe(machine)}; seed {SEED}, medians of {repeats}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
