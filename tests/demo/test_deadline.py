"""Training that ends by the clock."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.training.making import losses, settings
from vlparts.demo.deadline import Deadline, progress_bar
from vlparts.training.train import train


@pytest.mark.parametrize("seconds", [[1.0] * 40, [1.0, 1.0, 5.0, 1.0, 1.0, 1.0], [0.25] * 16 + [2.0] * 5])
def test_the_learning_rate_follows_the_clock(tmp_path: Path, seconds: list[float]) -> None:
    """Whatever steps take, it falls to zero at the end, as a cosine of the time that has passed."""
    total, reserved = 12.0, 2.0
    now = [100.0]
    steps = iter(seconds)

    class Steps(Deadline):
        """Each step takes its seconds."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now[0] += next(steps)

    output = io.StringIO()
    changes = {"max_steps": 1000, "warmup_ratio": 0.0, "trainer": {"disable_tqdm": True, "save_strategy": "no"}}
    with progress_bar(Console(file=output)) as bar:
        deadline = Steps(100 + total, lambda step: reserved, bar, lambda: now[0])
        result = train(settings(tmp_path, **changes), callbacks=[deadline])
    passed = [sum(seconds[: index + 1]) for index in range(result.steps)]
    assert passed[-2] < total - reserved <= passed[-1]
    found = [line["learning_rate"] for line in result.log if "loss" in line]
    expected = [0.01 * (1 + math.cos(math.pi * one / (total - reserved))) / 2 for one in [0.0, *passed[:-1]]]
    assert found == pytest.approx(expected, abs=0.01 * math.pi / 2 / 1000)
    assert f"step {result.steps}, loss {losses(result)[-1]:.3f}" in output.getvalue()


def test_slow_steps_leave_more_time_for_what_follows(tmp_path: Path) -> None:
    now = [0.0]

    class Steps(Deadline):
        """Each step takes two seconds."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now[0] += 2

    deadline = Steps(20.0, lambda step: 3 * step, progress_bar(Console(quiet=True)), lambda: now[0])
    assert train(settings(tmp_path, max_steps=50), callbacks=[deadline]).steps == 7
