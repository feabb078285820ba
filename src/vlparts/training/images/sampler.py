"""Sampler of packs of images for a DataLoader: planned online, divided among processes, exactly resumable."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data import Sampler

from .plan import ImagePlanner, ResolutionPolicy
from .steps import Pack, PlanState, StepPlanner
from .token_drop import DropPolicy

# Steps that may be yielded before they are consumed; far more than workers prefetch.
HISTORY_STEPS = 1024


@dataclass
class _Iteration:
    """Progress of one iteration.

    Args:
        history: Plan states, each with the number of steps that were yielded before it.
        yielded: Steps yielded so far.
    """

    history: deque[tuple[int, PlanState]]
    yielded: int = 0


class PackedImageSampler(Sampler[Pack]):
    """Yields packs of images of at most `capacity` patches; order, sizes and kept patches differ per epoch.

    The images of an epoch are shuffled, the grid and drop rate of each are drawn once, and the kept patches are packed
    by online first fit. Packs of similar cost share a step, `window` steps at a time. All processes compute the same
    plan and take their part of it, so they run equally many steps on different images.

    Pass it to a DataLoader as `sampler=` (with `batch_size=1` or None) or as `batch_sampler=`, with any number of
    workers, together with a [`PackedImageDataset`].

    Args:
        sizes: Height and width in pixels of each image, or a function from an index to them, which requires
            `num_images`.
        patch_size: Side P of a patch in pixels.
        capacity: Patches of a pack.
        max_items: Maximum number of images in a pack; None for no limit.
        merge_size: Side m of the blocks of patches that a consumer merges; see [`ImagePlanner`].
        resolution: Chooses the grid of each image, such as a [`ResolutionSampler`]; None keeps its size.
        token_drop: Chooses the drop rate, such as a [`BetaDrop`]; None drops nothing. A schedule depends on the number
            of images planned before, over all epochs and processes.
        oversize: Policy for an image with more kept patches than `capacity`: "raise", or "shrink" it.
        seed: Seed of all draws.
        shuffle: False keeps the order of the images, and yields steps in the order in which their packs are closed.
        carry_over: True passes packs that are not full at the end of an epoch on to the next epoch, which needs little
            padding; images of an epoch may then appear at the start of the next, even twice in one pack. False also
            yields packs that are not full, so that every image appears once per epoch; packs are halved until the
            processes get equally many, and if none is left to halve, some are empty.
        rank: Rank of this process; by default that of torch.distributed, or 0.
        world_size: Number of processes; by default that of torch.distributed, or 1.
        shard: False yields the packs of all processes, step by step, for a loader that divides them in turn, as
            accelerate's does.
        hidden_size: Width of the encoder, for the cost of a pack; see [`encoder_work`].
        window: Steps that are balanced together; more steps give packs of more similar cost.
        open_bins: Bins that first fit keeps open.
        num_images: Number of images if `sizes` is a function.

    Raises:
        ValueError: If an argument is out of range, or an image exceeds `capacity` whatever is drawn. An image that
            exceeds it after a draw raises when it is planned.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]] | np.ndarray | Callable[[int], tuple[int, int]],
        patch_size: int,
        capacity: int,
        max_items: int | None = None,
        *,
        merge_size: int = 1,
        resolution: ResolutionPolicy | None = None,
        token_drop: DropPolicy | None = None,
        oversize: str = "raise",
        seed: int = 0,
        shuffle: bool = True,
        carry_over: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        shard: bool = True,
        hidden_size: int = 768,
        window: int = 16,
        open_bins: int = 16,
        num_images: int | None = None,
    ) -> None:
        self.rank, self.world_size = _rank_and_world_size(rank, world_size)
        self.shard = shard
        self._steps = StepPlanner(
            ImagePlanner(
                patch_size,
                capacity,
                merge_size=merge_size,
                resolution=resolution,
                token_drop=token_drop,
                oversize=oversize,
                seed=seed,
            ),
            sizes,
            max_items,
            world_size=self.world_size,
            shuffle=shuffle,
            carry_over=carry_over,
            hidden_size=hidden_size,
            window=window,
            open_bins=open_bins,
            num_images=num_images,
        )
        self._length: int | None = None
        self._restart(PlanState())

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration."""
        return self._start.epoch

    @property
    def images_seen(self) -> int:
        """Images planned before the next iteration, over all epochs and processes."""
        return self._start.epoch * self._steps.num_images + self._start.position

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration.

        A finished iteration advances the epoch by itself. Setting the current epoch changes nothing, so that a loaded
        state is kept. With `carry_over` the epochs in between are planned (without reading images), since their last
        packs start this one.

        Raises:
            ValueError: If the epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"`epoch` must be at least 0, got {epoch}.")
        if epoch == self._start.epoch:
            return
        if self._steps.carry_over:
            state = self._start if epoch > self._start.epoch else PlanState()
            while state.epoch < epoch:
                state = deque(self._steps.windows(state), maxlen=1)[0][1]
        else:
            state = PlanState(epoch)
        self._restart(state)

    def __len__(self) -> int:
        """Number of packs of the next iteration; computed by planning all of them, which takes time."""
        if self._length is None:
            steps = sum(len(steps) for steps, _ in self._steps.windows(self._start)) - self._skip
            self._length = steps if self.shard else steps * self.world_size
        return self._length

    def __iter__(self) -> Iterator[Pack]:
        self._iteration = _Iteration(deque([(-self._skip, self._start)]))
        return self._packs(self._iteration)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return the state after some steps of the last iteration.

        Workers prefetch packs, so pass the number of batches that training has consumed.

        Args:
            consumed: Steps that this process consumed since the last `iter()`; by default the steps that were yielded,
                which is the same without prefetching.

        Returns:
            A JSON-serializable dict, the same on every process.

        Raises:
            ValueError: If fewer steps than that were yielded, or over 1024 more.
        """
        consumed = self._iteration.yielded if consumed is None else consumed
        known = [(start, state) for start, state in self._iteration.history if start <= consumed]
        if not 0 <= consumed <= self._iteration.yielded or not known:
            raise ValueError(
                f"`consumed` must be at most the {self._iteration.yielded} steps that the last iteration yielded, and "
                f"within the last {HISTORY_STEPS} of them, got {consumed}."
            )
        start, plan_state = known[-1]
        return {**plan_state.to_dict(), "skip": consumed - start, "settings": self._steps.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the next iteration from a state.

        Args:
            state: From `state_dict` of a sampler with the same settings. The `resolution` and `token_drop` policies
                are not compared; changed ones apply to images that are not planned yet.

        Raises:
            ValueError: If a setting differs.
        """
        for name, value in self._steps.settings().items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"`state` must be of a sampler with {name}={value!r}, got {state['settings'][name]!r}."
                )
        self._restart(PlanState.from_dict(state), state["skip"])

    def _restart(self, state: PlanState, skip: int = 0) -> None:
        """Start the next iteration `skip` steps after a plan state."""
        self._start, self._skip = state, skip
        self._length = None
        self._iteration = _Iteration(deque([(-skip, state)]))

    def _packs(self, iteration: _Iteration) -> Iterator[Pack]:
        """Yield the packs of this process and record the progress."""
        history = iteration.history
        for steps, after in self._steps.windows(history[0][1]):
            first = history[-1][0]
            history.append((first + len(steps), after))
            while history[1][0] <= iteration.yielded - HISTORY_STEPS:
                history.popleft()
            for step in steps[max(0, -first) :]:
                packs = [list(pack) for pack in (step[self.rank : self.rank + 1] if self.shard else step)]
                yield from packs[:-1]
                iteration.yielded += 1
                yield packs[-1]
        if iteration is self._iteration:
            self._start, self._skip, self._length = history[-1][1], 0, None


def _rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The given rank and number of processes, by default those of torch.distributed."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None:
        rank = torch.distributed.get_rank() if initialized else 0
    if world_size is None:
        world_size = torch.distributed.get_world_size() if initialized else 1
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must be in 0..world_size - 1, got rank={rank} and world_size={world_size}.")
    return rank, world_size
