"""Peak memory of a training step, predicted by `vlparts plan` and measured on CPU.

Each case runs in a process of its own, forked from one that has imported everything: a step with one sample, and one
with all of them under PyTorch's profiler (forward, backward, fused AdamW, gradients freed). "tensors" is the largest
sum of all tensors that are alive, from the profiler's record of every allocation and the sizes of parameters and
states before it. "process" is the growth of resident memory to its peak, which also has what the allocator keeps and
scratch of kernels. `tests/training/test_scaling.py` compares FLOPs and saved tensors of the same models.

    python tests/benchmarks/bench_plan.py [case ...]
"""

import multiprocessing
import resource
import sys
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, Qwen3Config

from vlparts import MoGEConfig, NaViTConfig, WindowFreeViTConfig, compose
from vlparts.training.scaling.memory import Strategy
from vlparts.training.scaling.planning import Run, estimate

SAMPLES, LENGTH, GRID, IMAGE_TOKEN = 4, 512, (16, 24), 5


def dense() -> Any:
    """NaViT and Qwen3, all trained."""
    vision = NaViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=6, patch_size=16
    )
    text = Qwen3Config(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=16000,
        tie_word_embeddings=True,
    )
    return compose(vision, text, image_token_id=IMAGE_TOKEN)


def experts() -> Any:
    """NaViT and MoGE, all trained."""
    vision = NaViTConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=3, patch_size=16
    )
    text = MoGEConfig(
        hidden_size=384,
        intermediate_size=1024,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        num_expert_groups=4,
        vocab_size=8000,
    )
    return compose(vision, text, image_token_id=IMAGE_TOKEN)


def frozen() -> Any:
    """Window-free encoder, frozen, and Llama."""
    vision = WindowFreeViTConfig(
        hidden_size=384, intermediate_size=1152, num_hidden_layers=6, num_attention_heads=6, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=16000,
    )
    model = compose(vision, text, image_token_id=IMAGE_TOKEN)
    model.model.vision_tower.requires_grad_(False)
    return model


CASES = {"dense": dense, "experts": experts, "frozen": frozen}


def batch_of(model: Any, samples: int = SAMPLES, length: int = LENGTH, grid: tuple[int, int] = GRID) -> dict[str, Any]:
    """A pack of samples of one length, with an image each."""
    rows, columns = grid
    tokens = rows * columns // model.config.merge_size**2
    ids = torch.randint(10, 5000, (samples, length))
    ids[:, 1 : 1 + tokens] = IMAGE_TOKEN
    bounds = torch.arange(samples + 1, dtype=torch.int32) * length
    return {
        "input_ids": ids.view(1, -1),
        "labels": torch.where(ids == IMAGE_TOKEN, -100, ids).view(1, -1),
        "position_ids": torch.arange(length).repeat(samples)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": length,
        "max_length_k": length,
        "pixel_values": torch.randn(samples * rows * columns, 3 * model.config.vision_config.patch_size**2),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * samples),
        "use_cache": False,
    }


def prepare(name: str, checkpointing: bool) -> Any:
    """The model of a case, ready to train."""
    torch.manual_seed(0)
    model = CASES[name]().train()
    model.set_attn_implementation({"text_config": "vlparts_packed"})
    if checkpointing:
        model.activation_checkpointing_enable()
    return model


def predict(
    model: Any,
    checkpointing: bool,
    precision: str,
    samples: int = SAMPLES,
    length: int = LENGTH,
    grid: tuple[int, int] = GRID,
) -> Any:
    """The estimate for one device and the pack of [`batch_of`]."""
    side, (rows, columns) = model.config.vision_config.patch_size, grid
    run = Run(
        devices=1,
        memory=1e12,
        capacity=samples * length,
        samples=1e6,
        sample_tokens=length,
        image_size=(columns * side, rows * side),
        precision=precision,  # type: ignore[arg-type]
    )
    return estimate(model, run, Strategy("none", checkpointing=checkpointing))


def measure(name: str, checkpointing: bool, precision: str) -> tuple[float, int, int]:
    """Return the predicted peak, that of all tensors, and that of the process, in bytes."""
    model = prepare(name, checkpointing)
    batch, small = batch_of(model), batch_of(model, 1)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], fused=True)

    def step(inputs: dict[str, Any]) -> None:
        with torch.autocast("cpu", torch.bfloat16) if precision == "mixed" else nullcontext():
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    step(small)
    states = [one for state in optimizer.state.values() for one in state.values()]
    before = sum(one.nbytes for one in (*model.parameters(), *states))
    baseline = resident() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(batch)
    events = [one for one in record.profiler.kineto_results.events() if one.name() == "[memory]"]
    live = largest = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        live += event.nbytes()
        largest = max(largest, live)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(name, checkpointing, precision, before + largest, peak - baseline, file=sys.stderr, flush=True)
    return predict(model, checkpointing, precision).memory.peak, before + largest, peak - baseline


def resident() -> int:
    """Resident memory of the process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main(names: list[str]) -> None:
    """Measure all cases and print the table."""
    table = Table("case", "precision", "checkpointing", "predicted MB", "tensors MB", "ratio", "process MB")
    cases = list(product(names or CASES, (False, True), ("float32", "mixed")))
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for (name, checkpointing, precision), found in zip(
            cases, pool.starmap(measure, cases, chunksize=1), strict=True
        ):
            predicted, tensors, process = found
            sizes = (f"{value / 1e6:.0f}" for value in (predicted, tensors))
            ratio, used = f"{predicted / tensors:.2f}", f"{process / 1e6:.0f}"
            table.add_row(name, precision, "yes" if checkpointing else "no", *sizes, ratio, used)
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
