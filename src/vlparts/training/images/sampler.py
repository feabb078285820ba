"""Packs of images for a DataLoader: planned online in the main process, shared among processes, resumed exactly."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data import Sampler

from .plan import ImagePlanner, ResolutionPolicy
from .steps import Pack, PlanPoint, StepPlanner
from .token_drop import DropPolicy

# Steps that may be handed out and not yet consumed, far beyond what workers fetch ahead.
HISTORY_STEPS = 1024


@dataclass
class _Iteration:
    """What one iteration handed out.

    Args:
        history: Points, each with the number of steps that were handed out before it.
        given: Steps handed out.
    """

    history: deque[tuple[int, PlanPoint]]
    given: int = field(default=0)


class PackedImageSampler(Sampler[Pack]):
    """Packs of images of at most `capacity` patches, each epoch in another order, size and selection of patches.

    An epoch's images are shuffled; for each its grid and drop rate are drawn, once; the patches that stay are packed
    by online first fit. Packs with similar work then share a step, `window` steps at a time. All processes compute the
    same plan and take their part, so they run equally many steps and see different images.

    A DataLoader takes it as `sampler=` (with `batch_size=1` or None) or as `batch_sampler=`, with any number of
    workers. See [`PackedImageDataset`] for the other half.

    Args:
        sizes: Height and width in pixels of each image, or a function from an image's index to them; then
            `num_images` is needed.
        patch_size: Side P of a patch in pixels.
        capacity: Patches of a pack.
        max_items: Largest number of images in a pack; None for no limit.
        merge_size: Side m of the blocks of patches that a consumer merges; see [`ImagePlanner`].
        resolution: Decides the grid of each image, such as a [`ResolutionSampler`]; None keeps its own size.
        token_drop: Decides how many patches stay, such as a [`BetaDrop`]; None for all. The number of images seen
            that a schedule depends on counts those that were planned before, over all epochs and processes.
        oversize: "raise" where the patches that stay exceed the capacity, or "shrink" the image until they do not.
        seed: Seed of all chance.
        shuffle: False takes the images in their order, and steps in the order in which their packs were closed.
        carry_over: True hands packs that are not full at the end of an epoch on to the next, so that hardly any
            padding is needed; an image of one epoch may then come at the start of the next, and even meet itself in a
            pack. False ends an epoch with packs that are not full, so that every image comes once in it; packs are
            halved until the processes get equally many, and where no pack is left to halve, some are empty.
        rank: Number of this process; by default torch.distributed's, or 0.
        world_size: Number of processes; by default torch.distributed's, or 1.
        shard: False gives the packs of all processes, step after step, for a loader that shares them out in turn by
            itself, as accelerate's does.
        hidden_size: Width of the encoder, for the work of a pack; see [`encoder_work`].
        window: Steps that are planned together. The more, the more similar is the work in a step.
        open_bins: Bins that first fit keeps open.
        num_images: Number of images where `sizes` is a function.

    Raises:
        ValueError: If an argument is outside of what is described, or an image cannot fit into a pack, as far as that
            is known before its grid is drawn. Later, an image that does not fit is an error when it is planned.
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
        self.rank, self.world_size = _place(rank, world_size)
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
        self._restart(PlanPoint())

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration is for."""
        return self._start.epoch

    @property
    def images_seen(self) -> int:
        """Images that were planned before the next iteration, over all epochs and processes."""
        return self._start.epoch * self._steps.num_images + self._start.position

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is for.

        An iteration that runs to its end does so by itself. The current epoch is left where it stands, so a state that
        was loaded stays. With `carry_over` the epochs between are planned (no image is read), since their last packs
        begin this one.

        Raises:
            ValueError: If the epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"`epoch` must be at least 0, got {epoch}.")
        if epoch == self._start.epoch:
            return
        if self._steps.carry_over:
            point = self._start if epoch > self._start.epoch else PlanPoint()
            while point.epoch < epoch:
                point = deque(self._steps.windows(point), maxlen=1)[0][1]
        else:
            point = PlanPoint(epoch)
        self._restart(point)

    def __len__(self) -> int:
        """Packs that the next iteration will give. They are planned to be counted, which takes its time."""
        if self._length is None:
            steps = sum(len(steps) for steps, _ in self._steps.windows(self._start)) - self._skip
            self._length = steps if self.shard else steps * self.world_size
        return self._length

    def __iter__(self) -> Iterator[Pack]:
        self._now = _Iteration(deque([(-self._skip, self._start)]))
        return self._packs(self._now)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """The state after some steps of the last iteration.

        Workers fetch ahead of training, so count the batches that training took.

        Args:
            consumed: Steps that training took since the last `iter()`, on each process. By default those that were
                handed out, which are the same where nothing is fetched ahead.

        Returns:
            Mappings, lists and numbers, which can be written as JSON. It is the same on every process.

        Raises:
            ValueError: If fewer steps than that were handed out, or over 1024 more.
        """
        consumed = self._now.given if consumed is None else consumed
        known = [(start, point) for start, point in self._now.history if start <= consumed]
        if not 0 <= consumed <= self._now.given or not known:
            raise ValueError(
                f"`consumed` is {consumed}; the last iteration handed out {self._now.given} steps, and keeps the "
                f"states of the last {HISTORY_STEPS}."
            )
        start, point = known[-1]
        return {**point.as_state(), "skip": consumed - start, "settings": self._steps.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from a state.

        Args:
            state: From `state_dict` of a sampler with the same settings. The policies for resolution and token drop
                are not compared: others act on the images that are not planned yet.

        Raises:
            ValueError: If a setting differs.
        """
        for name, value in self._steps.settings().items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"The state is of a sampler with {name}={state['settings'][name]!r}; this one has {value!r}."
                )
        self._restart(PlanPoint.from_state(state), state["skip"])

    def _restart(self, point: PlanPoint, skip: int = 0) -> None:
        """Let the next iteration start after `skip` steps from a point."""
        self._start, self._skip = point, skip
        self._length = None
        self._now = _Iteration(deque([(-skip, point)]))

    def _packs(self, now: _Iteration) -> Iterator[Pack]:
        """The packs of this process, while noting what was handed out."""
        for steps, after in self._steps.windows(now.history[0][1]):
            first = now.history[-1][0]
            now.history.append((first + len(steps), after))
            while now.history[1][0] <= now.given - HISTORY_STEPS:
                now.history.popleft()
            for step in steps[max(0, -first) :]:
                packs = [list(pack) for pack in (step[self.rank : self.rank + 1] if self.shard else step)]
                yield from packs[:-1]
                now.given += 1
                yield packs[-1]
        if now is self._now:
            self._start, self._skip, self._length = now.history[-1][1], 0, None


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Number of this process and number of processes."""
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None:
        rank = torch.distributed.get_rank() if known else 0
    if world_size is None:
        world_size = torch.distributed.get_world_size() if known else 1
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must lie in 0..world_size - 1, got rank={rank} and world_size={world_size}.")
    return rank, world_size
