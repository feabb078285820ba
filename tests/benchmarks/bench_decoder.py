"""Decoding with DeepSeek-OCR's decoder: ours against transformers' `UnlimitedOcrTextModel` with the same weights.

`python tests/benchmarks/bench_decoder.py` prints tokens per second of single steps behind a filled cache, and how many
times as fast ours are. Both read the same parameters, of order one, and get the same tokens; the native window is
longer than the context. `--layers 4` decodes with 4 of the 12 layers, for float32 on small machines.
`--profile` prints the operations that take most of the time of our steps, and of the native ones.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from timing import machine_line, print_table
from torch import Tensor, nn
from torch.profiler import profile
from transformers import DynamicCache
from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrTextConfig
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrTextModel

from vlparts import MoGEConfig, MoGEForCausalLM
from vlparts.moe import set_experts_implementation
from vlparts.parts.decoders import use_growing_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NATIVE = "native"
WINDOW = 4096  # tokens of the native window, more than any context here

Step = Callable[[Tensor, DynamicCache], Tensor]


def ours(layers: int, dtype: torch.dtype) -> MoGEForCausalLM:
    """Our decoder with head at full width, with weights of order one."""
    config = MoGEConfig.from_preset("deepseek_ocr", num_hidden_layers=layers)
    with torch.device("meta"):
        model = MoGEForCausalLM(config).to(dtype)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    table = torch.randn(2**24).to(dtype)  # drawing three billion numbers takes a minute
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        std = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
        for part in parameter.flatten().split(2**23):
            first = int(torch.randint(2**23, ()))
            torch.mul(table[first : first + len(part)], std, out=part)
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
    return model


def native_of(model: MoGEForCausalLM) -> UnlimitedOcrTextModel:
    """transformers' decoder without head, with the parameters of ours."""
    config = UnlimitedOcrTextConfig(num_hidden_layers=model.config.num_hidden_layers, sliding_window=WINDOW)
    with torch.device("meta"):
        native = UnlimitedOcrTextModel(config)
    native.rotary_emb = type(native.rotary_emb)(config)
    parameters = {
        name.replace("shared_expert.", "shared_experts."): parameter
        for name, parameter in model.model.named_parameters()
    }
    native.load_state_dict(parameters, assign=True)
    return native.eval()


def cache_of(config: Any, samples: int, tokens: int, dtype: torch.dtype) -> DynamicCache:
    """A cache that holds random keys and values of a context."""
    cache, generator = DynamicCache(config=config), torch.Generator().manual_seed(tokens)
    if isinstance(config, MoGEConfig):
        use_growing_layers(cache)  # as `generate` does
    for layer in range(config.num_hidden_layers):
        shape = (2, samples, config.num_key_value_heads, tokens, config.head_dim)
        cache.update(*torch.randn(shape, generator=generator).to(dtype), layer)
    return cache


def steps_of(model: MoGEForCausalLM, experts: list[str]) -> dict[str, tuple[Any, Step]]:
    """Configuration and step of the native model, in its default implementation of experts, and of ours in several."""
    native = native_of(model)

    def native_step(ids: Tensor, cache: DynamicCache) -> Tensor:
        outputs = native(ids, past_key_values=cache, use_cache=True)
        return model.lm_head(outputs.last_hidden_state)

    def our_step(name: str) -> Step:
        def step(ids: Tensor, cache: DynamicCache) -> Tensor:
            set_experts_implementation(model, name)
            return model(ids, past_key_values=cache, use_cache=True).logits

        return step

    label = f"{NATIVE}, {native.config._experts_implementation}"
    return {label: (native.config, native_step)} | {name: (model.config, our_step(name)) for name in experts}


@torch.inference_mode()
def measure(
    steps: dict[str, tuple[Any, Step]], samples: int, tokens: int, count: int, dtype: torch.dtype
) -> list[Any]:
    """Median seconds of a step for each candidate, which take turns; first they are compared."""
    caches = {name: cache_of(config, samples, tokens, dtype) for name, (config, _) in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(count + 2):
        ids = torch.randint(0, 129_280, (samples, 1))
        outputs = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            outputs[name] = steps[name][1](ids, caches[name])
            if turn >= 2:  # the first steps warm up, and `vlparts_auto` measures
                seconds[name].append(time.perf_counter() - begin)
        if turn < 2:
            for output in outputs.values():
                check(output, outputs[names[0]])
    return [statistics.median(seconds[name]) for name in names]


def check(found: Tensor, expected: Tensor) -> None:
    """Check that logits agree to rounding; in bfloat16 a token may change an expert, so the mean error counts."""
    error = (found.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt()
    limit = 0.15 if found.dtype == torch.bfloat16 else 1e-3
    assert error < limit, f"the logits differ by {float(error):.3g} of their size"


def main() -> None:
    """Print the requested tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps per setting; the median is printed")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--types", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--tokens", nargs="+", type=int, default=[300, 1000], help="tokens of the context")
    parser.add_argument("--experts", nargs="+", default=["grouped_mm", "vlparts_auto"])
    parser.add_argument("--profile", action="store_true", help="print only where the time goes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(machine_line())
    for dtype in arguments.types:
        model = ours(arguments.layers, DTYPES[dtype])
        steps = steps_of(model, arguments.experts)
        for samples, tokens in product(arguments.samples, arguments.tokens):
            if arguments.profile:
                show_profiles(steps, samples, tokens, DTYPES[dtype])
                continue
            seconds = measure(steps, samples, tokens, arguments.steps, DTYPES[dtype])
            label = f"{arguments.layers} layers, {dtype}, {samples} x {tokens} tokens"
            rates = [samples / one for one in seconds]
            speedups = [seconds[0] / one for one in seconds[1:]]
            print_table(
                ["setting", *(f"{name}, tokens/s" for name in steps), *(f"{name}, times" for name in [*steps][1:])],
                [[label, *rates, *speedups]],
            )
        del model, steps


@torch.inference_mode()
def show_profiles(steps: dict[str, tuple[Any, Step]], samples: int, tokens: int, dtype: torch.dtype) -> None:
    """Print the operations of a few steps by their own time."""
    for name, (config, step) in steps.items():
        cache = cache_of(config, samples, tokens, dtype)
        ids = torch.randint(0, 129_280, (5, samples, 1))
        for one in ids:
            step(one, cache)
        with profile() as recorded:
            for one in ids:
                step(one, cache)
        print(f"{name}, {samples} x {tokens} tokens, {len(ids)} steps")
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=60))


if __name__ == "__main__":
    main()
