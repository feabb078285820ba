"""Packs of images from an iterable dataset: without known sizes or random access."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Packs the images of an iterable, in the order in which online first fit closes the packs.

    For data that is read sequentially, such as shards of archives. If images can be loaded by index, prefer
    [`PackedImageSampler`], which shuffles, balances processes, and has states without pixels. Pass a stream to a
    DataLoader with `batch_size=None` and a [`PackedImageCollator`].

    Args:
        items: An iterable, iterated once per epoch, of images, items with an image at `image_key`, or
            [`PatchedImage`]s, which are packed without further processing. Each process needs its own items and seed:
            those of an `IterableDataset` of the datasets library come from its `split_dataset_by_node`.
        image_processor: Processes the images; sets `patch_size` and `merge_size`.
        capacity: Patches of a pack.
        max_items: Maximum number of images in a pack; None for no limit.
        image_key: Key (mappings) or index (tuples) of the image in an item; None if the item is the image.
        label_key: Key or index of the label in an item, see [`PackedImageDataset`]; None for no labels.
        num_channels: Channels C of all images.
        resolution: Chooses the grid of each image; None keeps its size.
        token_drop: Chooses the drop rate; None drops nothing.
        oversize: Policy for an image with more kept patches than `capacity`: "raise", or "shrink" it.
        seed: Seed of all draws; those of an image depend on it, the epoch and the position of the image.
        open_bins: Bins that first fit keeps open, in each worker.
        divide: Who divides the items among DataLoader workers: "stream" (each worker takes every n-th item) or "items"
            (the iterable does). Required with several workers, since a wrong choice loses or repeats images. An
            `IterableDataset` of the datasets library always divides itself, so that `divide` is not needed.
        world_size: Number of processes with a stream each, for the number of images seen.

    Raises:
        ValueError: If an argument is out of range, `items` is a mapping, or `divide` is "items" for a sequence or a
            `Dataset` of the datasets library, which do not divide themselves. On iteration, if `divide` is missing, or
            `items` is an iterator that an earlier epoch has read.
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
        if isinstance(items, Mapping):
            raise ValueError(f"`items` must be an iterable of images, got a {type(items).__name__}; choose a split.")
        if _is_from_datasets(items, "IterableDataset"):
            divide = "items"
        elif divide == "items" and (isinstance(items, Sequence) or _is_from_datasets(items, "Dataset")):
            raise ValueError(
                f"`divide` must not be 'items' for a {type(items).__name__}, which every worker would read in full; "
                "pass divide='stream'."
            )
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
        # In shared memory, so that persistent workers see a new epoch.
        self._epoch = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._ready: list[list[PatchedImage]] = []
        self._taken, self._ended = 0, False
        self._resumed = self._finished = False

    def set_epoch(self, epoch: int, images_seen: int = 0) -> None:
        """Set the epoch of the next iteration.

        Args:
            epoch: The epoch.
            images_seen: Images seen in training before this epoch, over all processes.
        """
        self._epoch.copy_(torch.tensor([epoch, images_seen]))

    def __iter__(self) -> Iterator[list[PatchedImage]]:
        worker, workers = self._worker()
        if not self._resumed:
            if self._finished and isinstance(self.items, Iterator):
                raise ValueError(
                    f"`items` is a {type(self.items).__name__}, which an earlier epoch has read; pass an iterable "
                    "that can be iterated again."
                )
            self._packer.flush()
            self._ready, self._taken, self._ended = [], 0, False
        self._resumed = False
        for item in self._remaining_items():
            position, self._taken = self._taken, self._taken + 1
            if self.divide == "items":
                position = position * workers + worker
            elif position % workers != worker:
                continue
            image = item if isinstance(item, PatchedImage) else self._cut(item, position)
            self._ready += self._packer.add(image, len(image.patches))
            yield from self._pop_ready()
        self._ended = self._finished = True
        self._ready += self._packer.flush()
        yield from self._pop_ready()

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the packs yielded so far, for an iteration in this process (no workers).

        Returns:
            Integers, and the images of open packs with up to `open_bins * capacity` patches. `items` is the state of
            the iterable if it has a `state_dict`; otherwise the consumed items are read again and skipped on resuming.
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
        """Continue the next iteration from a state of a stream with the same arguments.

        Raises:
            ValueError: If an open pack exceeds a limit of this stream.
        """
        bins = [{**one, "items": [PatchedImage(**image) for image in one["items"]]} for one in state["open_bins"]]
        self._packer.load_state_dict({"bins": bins})
        self.set_epoch(*state["epoch"])
        self._ready = [[PatchedImage(**image) for image in pack] for pack in state["ready"]]
        self._taken, self._ended = state["taken"], state["ended"]
        if hasattr(self.items, "load_state_dict"):
            self.items.load_state_dict(state["items"])
        self._resumed = True

    def _remaining_items(self) -> Iterator[Any]:
        if self._ended:
            return iter(())
        return islice(self.items, 0 if hasattr(self.items, "load_state_dict") else self._taken, None)

    def _pop_ready(self) -> Iterator[list[PatchedImage]]:
        while self._ready:
            yield self._ready.pop(0)

    def _cut(self, item: Any, position: int) -> PatchedImage:
        epoch, images_seen = self._epoch.tolist()
        image, label = self._cutter.read(item, position)
        height, width = image.shape[-2:]
        plan = self._planner.plan(position, height, width, epoch, images_seen + position * self.world_size)
        return self._cutter.cut(image, plan, label)

    def _worker(self) -> tuple[int, int]:
        """Index of this worker, and number of workers."""
        info = get_worker_info()
        if info is None or info.num_workers == 1:
            return 0, 1
        if self.divide is None:
            raise ValueError(f"`divide` must be 'stream' or 'items' with {info.num_workers} workers, got None.")
        return info.id, info.num_workers


def _is_from_datasets(items: Any, name: str) -> bool:
    """Whether this is an instance of a class of the datasets library, which need not be installed."""
    return any(base.__name__ == name and base.__module__.startswith("datasets.") for base in type(items).__mro__)
