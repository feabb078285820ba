"""The steps of an epoch: images in their order, packed online, with similar work in the same step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...parts.packed_bins import FirstFitPacker
from ...parts.utils import positive_integer
from .balance import balanced_steps, divided, encoder_work
from .plan import ImagePlan, ImagePlanner, checked_sizes
from .resolution import seeded_generator

Pack = list[ImagePlan]


@dataclass(frozen=True)
class PlanPoint:
    """Where planning stands: all that the packs after it depend on, besides the settings.

    Args:
        epoch: The epoch.
        position: Images of the epoch that were planned.
        open_bins: Images of each bin that first fit holds open.
        waiting: Closed packs that have no step yet.
    """

    epoch: int = 0
    position: int = 0
    open_bins: tuple[Pack, ...] = ()
    waiting: tuple[Pack, ...] = ()

    def as_state(self) -> dict[str, Any]:
        """The point in lists and integers."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "open_bins": [[list(plan) for plan in pack] for pack in self.open_bins],
            "waiting": [[list(plan) for plan in pack] for pack in self.waiting],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "PlanPoint":
        """The point from what `as_state` gave; other keys are ignored."""
        packs = {
            name: tuple([ImagePlan(*plan) for plan in pack] for pack in state[name])
            for name in ("open_bins", "waiting")
        }
        return cls(state["epoch"], state["position"], **packs)


class StepPlanner:
    """Plans the steps of all processes; see [`PackedImageSampler`] for the arguments.

    It holds no state: what comes after a point depends on the point and the settings alone.
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
        self.sizes, self.num_images = _known_sizes(sizes, num_images, planner)
        self.world_size = world_size
        self.max_items = max_items
        self.open_bins = open_bins
        self.shuffle, self.carry_over = shuffle, carry_over
        self.hidden_size = positive_integer(hidden_size, "hidden_size")
        self.window = positive_integer(window, "window")
        self._packer(())

    def settings(self) -> dict[str, Any]:
        """What must agree for a point to make sense, as numbers."""
        own = ("num_images", "world_size", "max_items", "open_bins", "shuffle", "carry_over", "hidden_size", "window")
        settings = {name: getattr(self, name) for name in own}
        of_images = ("patch_size", "merge_size", "capacity", "oversize", "seed")
        return settings | {name: getattr(self.planner, name) for name in of_images}

    def windows(self, point: PlanPoint) -> Iterator[tuple[list[list[Pack]], PlanPoint]]:
        """Plan what is left of an epoch.

        Args:
            point: Where to start.

        Yields:
            Some steps, each with a pack for every process, and the point after them. The last point is the start of
            the next epoch; its steps may be none.
        """
        packer = self._packer(point.open_bins)
        epoch, waiting = point.epoch, list(point.waiting)
        size = self.world_size * self.window
        # Without carrying over, packs are held back that can be halved at the end of the epoch.
        enough = size if self.carry_over else size + self.world_size
        order = self._order(epoch)
        for position in range(point.position, self.num_images):
            plan = self._plan(int(order[position]), epoch, epoch * self.num_images + position)
            waiting += packer.add(plan, plan.kept)
            while len(waiting) >= enough:
                steps, waiting = self._arranged(waiting[:size]), waiting[size:]
                yield steps, PlanPoint(epoch, position + 1, _held(packer), tuple(waiting))
        if not self.carry_over:
            waiting = divided(waiting + packer.flush(), self.world_size)
            waiting += [[] for _ in range(-len(waiting) % self.world_size)]
        whole = len(waiting) - len(waiting) % self.world_size
        steps = self._arranged(waiting[:whole])
        yield steps, PlanPoint(epoch + 1, 0, _held(packer), tuple(waiting[whole:]))

    def _packer(self, open_bins: Sequence[Pack]) -> FirstFitPacker[ImagePlan]:
        packer: FirstFitPacker[ImagePlan] = FirstFitPacker(self.planner.capacity, self.max_items, self.open_bins)
        bins = [{"items": pack, "length": sum(plan.kept for plan in pack)} for pack in open_bins]
        packer.load_state_dict({"bins": bins})
        return packer

    def _order(self, epoch: int) -> Sequence[int] | np.ndarray:
        if not self.shuffle:
            return range(self.num_images)
        # No image has this index, so its stream is free.
        return seeded_generator(self.planner.seed, epoch, self.num_images).permutation(self.num_images)

    def _plan(self, index: int, epoch: int, images_seen: int) -> ImagePlan:
        if callable(self.sizes):
            height, width = _checked_size(self.sizes(index), index)
        else:
            height, width = self.sizes[index].tolist()
        return self.planner.plan(index, height, width, epoch, images_seen)

    def _arranged(self, packs: list[Pack]) -> list[list[Pack]]:
        """Share packs out over steps and processes."""
        works = [encoder_work([plan.kept for plan in pack], self.hidden_size) for pack in packs]
        return [[packs[place] for place in places] for places in balanced_steps(works, self.world_size)]


def _held(packer: FirstFitPacker[ImagePlan]) -> tuple[Pack, ...]:
    return tuple(one["items"] for one in packer.state_dict()["bins"])


def _known_sizes(
    sizes: Any, num_images: int | None, planner: ImagePlanner
) -> tuple[np.ndarray | Callable[[int], tuple[int, int]], int]:
    """Sizes as an array or a function, and the number of images."""
    if callable(sizes):
        if num_images is None:
            raise ValueError("`num_images` is needed where `sizes` is a function.")
        return sizes, positive_integer(num_images, "num_images")
    array = checked_sizes(sizes)
    if num_images not in (None, len(array)):
        raise ValueError(f"`num_images` is {num_images}, but there are {len(array)} sizes.")
    planner.check_sizes(array)
    return array, len(array)


def _checked_size(size: Any, index: int) -> tuple[int, int]:
    try:
        height, width = size
        return positive_integer(height, "height"), positive_integer(width, "width")
    except (TypeError, ValueError):
        raise ValueError(
            f"`sizes({index})` is {size!r}; expected a height and a width in pixels, both at least 1."
        ) from None
