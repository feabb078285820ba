"""What the metrics of a training run cost, in steps of `train` and for a large vocabulary.

`python tests/benchmarks/bench_metrics.py [--steps N] [--repeats N] [--classes N] [--hidden N]` first checks that both
runs have the same losses to the bit. It prints seconds per step of the demo's model on the demo's images, and for one
pack of 2,048 tokens, a quarter of them with loss, seconds of the head with its loss, forward and backward, and of the
losses of single tokens.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import compare, machine_line, print_table
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from vlparts.demo.data import Task, write_dataset
from vlparts.demo.run import SETTINGS
from vlparts.losses.causal_lm import next_token_losses
from vlparts.training.config import TrainConfig
from vlparts.training.train import train

TOKENS, FIRST = 2048, 5  # steps that are not timed


class Clock(TrainerCallback):
    """Keeps the time of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def train_steps(folder: Path, data: Path, steps: int, metrics: bool) -> tuple[float, list[float]]:
    """Seconds per step of a run, and its losses."""
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=folder) as output:
        quiet = {"disable_tqdm": True, "save_strategy": "no", "log_level": "error"}
        fields = {**SETTINGS, "max_steps": steps, "metrics": metrics, "trainer": quiet}
        result = train(TrainConfig(data=data, output=Path(output), **fields), callbacks=[clock])
    seconds = (clock.times[-1] - clock.times[FIRST - 1]) / (steps - FIRST)
    return seconds, [line["train_loss"] for line in result.log if "train_loss" in line]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--classes", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_dataset(folder, "train", 400, Task(), held_out=False, seed=0)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.repeats):
            found = {metrics: train_steps(folder, data, options.steps, metrics) for metrics in (True, False)}
            assert found[True][1] == found[False][1], "metrics change the losses"
            for metrics, (seconds, _) in found.items():
                times[metrics].append(seconds)
    with_metrics, without = min(times[True]), min(times[False])
    rows = [["with metrics", f"{with_metrics:.4f}"], ["without", f"{without:.4f}"]]
    print_table(["seconds per step of train", f"ratio {with_metrics / without:.3f}"], rows)

    hidden = torch.randn(1, TOKENS, options.hidden)
    weight = torch.randn(options.classes, options.hidden).mul_(0.02).requires_grad_()
    labels = torch.randint(options.classes, (1, TOKENS))
    labels[:, : TOKENS * 3 // 4] = -100
    with torch.no_grad():
        logits = F.linear(hidden, weight)
        losses, mask = next_token_losses(logits, labels)
        torch.testing.assert_close(losses[mask].mean(), ForCausalLMLoss(logits, labels, options.classes))

    def head() -> None:
        ForCausalLMLoss(F.linear(hidden, weight), labels, options.classes).backward()
        weight.grad = None

    def single() -> None:
        with torch.no_grad():
            next_token_losses(logits, labels)

    seconds = compare({"head and loss": head, "losses of single tokens": single}, options.repeats)
    print_table(["one pack", "seconds"], [[name, f"{value:.3f}"] for name, value in seconds.items()])


if __name__ == "__main__":
    main()
