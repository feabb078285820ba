"""Planning of the steps of an epoch: images packed online, with packs of similar cost in the same step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...parts.utils import positive_integer
from ..bins import FirstFitPacker
from .balance import balanced_steps, encoder_work, split_packs
from .plan import ImagePlan, ImagePlanner, checked_sizes
from .resolution import seeded_generator

Pack = list[ImagePlan]


@dataclass(frozen=True)
class PlanState:
    """State of the planning, which determines all later packs together with the settings.

    Args:
        epoch: The epoch.
        position: Number of images of the epoch that are planned.
        open_bins: Images of each open bin of first fit.
        waiting: Closed packs that are not in a step yet.
    """

    epoch: int = 0
    position: int = 0
    open_bins: tuple[Pack, ...] = ()
    waiting: tuple[Pack, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dict."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "open_bins": [[list(plan) for plan in pack] for pack in self.open_bins],
            "waiting": [[list(plan) for plan in pack] for pack in self.waiting],
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "PlanState":
        """Restore from the dict of `to_dict`; other keys are ignored."""
        packs = {
            name: tuple([ImagePlan(*plan) for plan in pack] for pack in state[name])
            for name in ("open_bins", "waiting")
        }
        return cls(state["epoch"], state["position"], **packs)


class StepPlanner:
    """Plans the steps of all processes; see [`PackedImageSampler`] for the arguments.

    It is stateless: later steps depend on a [`PlanState`] and the settings only.
    """

    def __init__(
        self,
        planner: ImagePlanner,
        sizes: Sequence[tuple[int, int]] | np.ndarray | Callable[[int], tuple[int, int]],
        max_items: int | None,
        *,
        world_size: int,
        shuffle: bool,
        carry_over: bool,
        hidden_size: int,
        window: int,
        open_bins: int,
        num_images: int | None,
    ) -> None:
        self.planner = planner
        self.sizes, self.num_images = _check_sizes(sizes, num_images, planner)
        self.world_size = world_size
        self.max_items = max_items
        self.open_bins = open_bins
        self.shuffle, self.carry_over = shuffle, carry_over
        self.hidden_size = positive_integer(hidden_size, "hidden_size")
        self.window = positive_integer(window, "window")
        self._packer(())  # checks `max_items` and `open_bins`

    def settings(self) -> dict[str, Any]:
        """Return the settings that must be equal for a state to be valid."""
        own = ("num_images", "world_size", "max_items", "open_bins", "shuffle", "carry_over", "hidden_size", "window")
        of_planner = ("patch_size", "merge_size", "capacity", "oversize", "seed")
        settings = {name: getattr(self, name) for name in own}
        return settings | {name: getattr(self.planner, name) for name in of_planner}

    def windows(self, state: PlanState) -> Iterator[tuple[list[list[Pack]], PlanState]]:
        """Plan the rest of an epoch, window by window.

        Args:
            state: The state to start from.

        Yields:
            Some steps, each with one pack per process, and the state after them. The last state is the start of the
            next epoch, possibly without steps.
        """
        packer = self._packer(state.open_bins)
        epoch, waiting = state.epoch, list(state.waiting)
        size = self.world_size * self.window
        # Without carry-over, some packs are held back, to be halved at the end of the epoch.
        enough = size if self.carry_over else size + self.world_size
        order = self._order(epoch)
        for position in range(state.position, self.num_images):
            plan = self._plan(int(order[position]), epoch, epoch * self.num_images + position)
            waiting += packer.add(plan, plan.kept)
            while len(waiting) >= enough:
                steps, waiting = self._balance(waiting[:size]), waiting[size:]
                yield steps, PlanState(epoch, position + 1, _open_bins(packer), tuple(waiting))
        if not self.carry_over:
            waiting = split_packs(waiting + packer.flush(), self.world_size)
            waiting += [[] for _ in range(-len(waiting) % self.world_size)]
        end = len(waiting) - len(waiting) % self.world_size
        steps = self._balance(waiting[:end])
        yield steps, PlanState(epoch + 1, 0, _open_bins(packer), tuple(waiting[end:]))

    def _packer(self, open_bins: Sequence[Pack]) -> FirstFitPacker[ImagePlan]:
        packer: FirstFitPacker[ImagePlan] = FirstFitPacker(self.planner.capacity, self.max_items, self.open_bins)
        bins = [{"items": pack, "length": sum(plan.kept for plan in pack)} for pack in open_bins]
        packer.load_state_dict({"bins": bins})
        return packer

    def _order(self, epoch: int) -> Sequence[int] | np.ndarray:
        if not self.shuffle:
            return range(self.num_images)
        # `num_images` is not the index of an image, so its generator is unused.
        return seeded_generator(self.planner.seed, epoch, self.num_images).permutation(self.num_images)

    def _plan(self, index: int, epoch: int, images_seen: int) -> ImagePlan:
        if callable(self.sizes):
            height, width = _check_size(self.sizes(index), index)
        else:
            height, width = self.sizes[index].tolist()
        return self.planner.plan(index, height, width, epoch, images_seen)

    def _balance(self, packs: list[Pack]) -> list[list[Pack]]:
        """Group packs into steps of similar cost."""
        works = [encoder_work([plan.kept for plan in pack], self.hidden_size) for pack in packs]
        return [[packs[index] for index in step] for step in balanced_steps(works, self.world_size)]


def _open_bins(packer: FirstFitPacker[ImagePlan]) -> tuple[Pack, ...]:
    return tuple(one["items"] for one in packer.state_dict()["bins"])


def _check_sizes(
    sizes: Any, num_images: int | None, planner: ImagePlanner
) -> tuple[np.ndarray | Callable[[int], tuple[int, int]], int]:
    """Return sizes as an array or a function, and the number of images."""
    if callable(sizes):
        if num_images is None:
            raise ValueError("`num_images` is required if `sizes` is a function.")
        return sizes, positive_integer(num_images, "num_images")
    array = checked_sizes(sizes)
    if num_images not in (None, len(array)):
        raise ValueError(f"`num_images` must be the length of `sizes`, {len(array)}, got {num_images}.")
    planner.check_sizes(array)
    return array, len(array)


def _check_size(size: Any, index: int) -> tuple[int, int]:
    try:
        height, width = size
        return positive_integer(height, "height"), positive_integer(width, "width")
    except (TypeError, ValueError):
        raise ValueError(
            f"`sizes({index})` must be a height and a width in pixels, both at least 1, got {size!r}."
        ) from None
