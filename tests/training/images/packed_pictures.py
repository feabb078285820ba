"""Pictures with labels, their plans and their patches, for tests of packing."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tests.tiny import picture
from vlparts import NaViTImageProcessor
from vlparts.training.images.packing import PackedImageDataset, PatchedImage
from vlparts.training.images.plan import ImagePlan, ImagePlanner
from vlparts.training.images.token_drop import ConstantDrop

AREAS = {"shortest_edge": 16, "longest_edge": 9999}  # all pictures keep their sizes
PROCESSOR = NaViTImageProcessor(patch_size=4, size=AREAS)
SIZES = [(20, 12), (8, 8), (9, 31), (40, 40), (16, 24), (4, 4), (30, 10), (12, 12)]  # height and width
PICTURES = [picture(width, height) for height, width in SIZES]
CAPACITY, MAX_ITEMS = 110, 4


class Labelled:
    """Pictures with a label, as mappings."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": PICTURES[index], "label": index % 3}


def plan_of(index: int, rate: float = 0.0, merge_size: int = 1, epoch: int = 0) -> ImagePlan:
    planner = ImagePlanner(4, 10_000, merge_size=merge_size, token_drop=ConstantDrop(rate))
    return planner.plan(index, *SIZES[index], epoch)


def whole(index: int, processor: NaViTImageProcessor = PROCESSOR) -> Tensor:
    """All patches of a picture, straight from the image processor."""
    return processor(PICTURES[index], return_tensors="pt")["pixel_values"]


def images_of(rates: Sequence[float], indices: Sequence[int] = range(8), **options: Any) -> list[PatchedImage]:
    """Pictures cut at the given drop rates."""
    plans = [plan_of(index, rate) for index, rate in zip(indices, rates, strict=False)]
    return PackedImageDataset(Labelled(), PROCESSOR, "image", "label", **options)[plans]
