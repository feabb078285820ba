"""Packs of images from a stream: no sizes known beforehand, no random access."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ...parts.image_processing_navit import NaViTImageProcessor
from ..bins import FirstFitPacker
from .packing import ImageCutter, PatchedImage
from .plan import ImagePlanner, ResolutionPolicy
from .token_drop import DropPolicy


class PackedImageStream(IterableDataset[list[PatchedImage]]):
    """Packs of images from an iterable, in the order in which online first fit closes them.

    For data that can only be read through, such as shards of archives. Where images can be loaded by index,
    [`PackedImageSampler`] does more: it shuffles, balances processes, and its states hold no pixels. A DataLoader
    takes a stream with `batch_size=None` and a [`PackedImageCollator`].

    Args:
        items: What holds the images, iterated anew each epoch: images, items with an image at `image_key`, or
            [`PatchedImage`]s that are packed as they are. Give each process items of its own, and a seed of its own.
        image_processor: As for [`PackedImageDataset`], and so are `image_key`, `label_key` and `num_channels`. Its
            `patch_size` and `merge_size` count.
        capacity: Patches of a pack.
        max_items: Largest number of images in a pack; None for no limit.
        image_key: Where the image stands in an item.
        label_key: Where the label stands in an item.
        num_channels: Channels C of all images.
        resolution: Decides the grid of each image; None keeps its own size.
        token_drop: Decides how many patches stay; None for all.
        oversize: As for [`PackedImageSampler`].
        seed: Seed of all chance. What is drawn for an image depends on it, the epoch and the image's place.
        open_bins: Bins that first fit keeps open, in each worker.
        divide: Who divides the items among the workers of a DataLoader: "stream" lets each take every n-th item,
            "items" says that the iterable does so itself (as those of the datasets library do). With several workers
            it must be given, since a wrong choice loses images or doubles them.
        world_size: Number of processes with a stream each, for the number of images seen.

    Raises:
        ValueError: If an argument is outside of what is described.
    """

    def __init__(
        self,
        items: Iterable[Any],
        image_processor: NaViTImageProcessor,
        capacity: int,
        max_items: int | None = None,
        *,
        image_key: str | int | None = None,
        label_key: str | int | None = None,
        num_channels: int = 3,
        resolution: ResolutionPolicy | None = None,
        token_drop: DropPolicy | None = None,
        oversize: str = "raise",
        seed: int = 0,
        open_bins: int = 16,
        divide: str | None = None,
        world_size: int = 1,
    ) -> None:
        if divide not in (None, "stream", "items"):
            raise ValueError(f"`divide` must be None, 'stream' or 'items', got {divide!r}.")
        self.items = items
        self.divide, self.world_size = divide, world_size
        self._cutter = ImageCutter(image_processor, image_key, label_key, num_channels)
        self._planner = ImagePlanner(
            image_processor.patch_size,
            capacity,
            merge_size=image_processor.merge_size,
            resolution=resolution,
            token_drop=token_drop,
            oversize=oversize,
            seed=seed,
        )
        self._packer: FirstFitPacker[PatchedImage] = FirstFitPacker(capacity, max_items, open_bins)
        # In shared memory, so that workers that live on see a new epoch.
        self._epoch = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._ready: list[list[PatchedImage]] = []
        self._taken, self._ended = 0, False
        self._resumed = False

    def set_epoch(self, epoch: int, images_seen: int = 0) -> None:
        """Choose the epoch that the next iteration is for.

        Args:
            epoch: The epoch.
            images_seen: Images that training saw before this epoch, over all processes.
        """
        self._epoch.copy_(torch.tensor([epoch, images_seen]))

    def __iter__(self) -> Iterator[list[PatchedImage]]:
        worker, workers = self._worker()
        if not self._resumed:
            self._packer.flush()
            self._ready, self._taken, self._ended = [], 0, False
        self._resumed = False
        for item in self._left():
            place, self._taken = self._taken, self._taken + 1
            if self.divide == "items":
                place = place * workers + worker
            elif place % workers != worker:
                continue
            image = item if isinstance(item, PatchedImage) else self._cut(item, place)
            self._ready += self._packer.add(image, len(image.patches))
            yield from self._handed_out()
        self._ended = True
        self._ready += self._packer.flush()
        yield from self._handed_out()

    def state_dict(self) -> dict[str, Any]:
        """The state after the packs that were handed out, for an iteration in this process (no workers).

        Returns:
            Integers, and the images of open packs with their patches: up to `open_bins * capacity` of them. `items`
            is the state of the iterable if it has a `state_dict`; otherwise the items that were taken are read again
            and left out.
        """
        images = self._packer.state_dict()
        bins = [{**one, "items": [dict(vars(image)) for image in one["items"]]} for one in images["bins"]]
        return {
            "epoch": self._epoch.tolist(),
            "taken": self._taken,
            "ended": self._ended,
            "open_bins": bins,
            "ready": [[dict(vars(image)) for image in pack] for pack in self._ready],
            "items": self.items.state_dict() if hasattr(self.items, "state_dict") else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from a state of a stream with the same arguments.

        Raises:
            ValueError: If the open packs exceed a limit of this stream.
        """
        bins = [{**one, "items": [PatchedImage(**image) for image in one["items"]]} for one in state["open_bins"]]
        self._packer.load_state_dict({"bins": bins})
        self.set_epoch(*state["epoch"])
        self._ready = [[PatchedImage(**image) for image in pack] for pack in state["ready"]]
        self._taken, self._ended = state["taken"], state["ended"]
        if hasattr(self.items, "load_state_dict"):
            self.items.load_state_dict(state["items"])
        self._resumed = True

    def _left(self) -> Iterator[Any]:
        """The items that were not taken yet."""
        if self._ended:
            return iter(())
        return islice(self.items, 0 if hasattr(self.items, "load_state_dict") else self._taken, None)

    def _handed_out(self) -> Iterator[list[PatchedImage]]:
        while self._ready:
            yield self._ready.pop(0)

    def _cut(self, item: Any, place: int) -> PatchedImage:
        epoch, images_seen = self._epoch.tolist()
        image, label = self._cutter.read(item, place)
        height, width = image.shape[-2:]
        plan = self._planner.plan(place, height, width, epoch, images_seen + place * self.world_size)
        return self._cutter.cut(image, plan, label)

    def _worker(self) -> tuple[int, int]:
        """Number of this worker and number of workers."""
        info = get_worker_info()
        if info is None or info.num_workers == 1:
            return 0, 1
        if self.divide is None:
            raise ValueError(
                f"With {info.num_workers} workers, `divide` must say who divides the items among them: 'stream' or "
                "'items'."
            )
        return info.id, info.num_workers
