"""Training that ends by the clock."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["Deadline", "progress_bar"]


def progress_bar(console: Console) -> Progress:
    """A bar for [`Deadline`], to be used in a `with` statement, which ends it also if training is interrupted."""
    shown = TextColumn("Training, step {task.fields[step]}, loss {task.fields[loss]}")
    return Progress(shown, BarColumn(), TimeRemainingColumn(), console=console)


class Deadline(TrainerCallback):
    """Ends training in time for what follows it, with a learning rate that follows the clock, and shows the progress.

    The Trainer's schedule is read at the share of the time that has passed, not at the share of steps. So at the end
    it is where it would be after `max_steps`, however fast the machine is and whatever else it does.

    Args:
        end: Value of `clock` at which everything has to be finished.
        reserve: Seconds that what follows takes, as a function of the mean seconds of a training step.
        bar: A [`progress_bar`].
        clock: Returns seconds.
    """

    def __init__(
        self,
        end: float,
        reserve: Callable[[float], float],
        bar: Progress,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._end, self._reserve, self._bar, self._clock = end, reserve, bar, clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = self._clock()
        self._task = self._bar.add_task("", total=1.0, step=0, loss="-")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the schedule to the time; the Trainer advances it after this."""
        now, steps = self._clock(), state.global_step + 1
        left = self._end - self._reserve((now - self._start) / steps) - now
        share = 1.0 if left <= 0 else (now - self._start) / (now - self._start + left)
        kwargs["lr_scheduler"].last_epoch = min(round(share * state.max_steps), state.max_steps) - 1
        self._bar.update(self._task, completed=share, step=steps)
        control.should_training_stop |= left <= 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss."""
        if "loss" in (logs or {}):
            self._bar.update(self._task, loss=f"{float(logs['loss']):.3f}")
