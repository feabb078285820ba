"""Regions of images in JSON Lines files and training records.

The line of an image is `{"image": "a.png", "width": 640, "height": 480, "regions": [...]}`. A region is an object with
its kind as a key, such as `{"box": [x1, y1, x2, y2]}`, `{"point": [x, y]}` or `{"polygon": [[x, y], ...]}`, and
optional keys "label", "score", "image", "identity", "times" and "attributes" (an object). Training records have boxes
and points of the same form.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..json_values import NO_ATTRIBUTES, as_attributes
from ..regions import KINDS, Region
from ..validation import check_size, positive_integer
from .json_lines import read_json_lines, write_json_lines

__all__ = [
    "ImageRegions",
    "read_annotations",
    "record_regions",
    "region_from_dict",
    "region_to_dict",
    "training_record",
    "write_annotations",
]

EXTRAS = ("label", "score", "image", "identity", "times", "attributes")


@dataclass(frozen=True)
class ImageRegions:
    """An image and its regions.

    Args:
        image: Path or name of the image.
        width: Width in pixels.
        height: Height in pixels.
        regions: Regions in pixels of this image.
        attributes: What else is known of the image: names with JSON values, see [`Region`].

    Raises:
        ValueError: If `image` is not a str, a side is not a positive integer, an item of `regions` is not a Region, or
            an attribute is not a JSON value.
    """

    image: str
    width: int
    height: int
    regions: tuple[Region, ...] = ()
    attributes: Mapping[str, Any] = NO_ATTRIBUTES

    def __post_init__(self) -> None:
        if not isinstance(self.image, str):
            raise ValueError(f"`image` must be a str, got {self.image!r}.")
        for name in ("width", "height"):
            object.__setattr__(self, name, positive_integer(getattr(self, name), name))
        check_size((self.width, self.height), "(width, height)")
        object.__setattr__(self, "regions", tuple(self.regions))
        for index, region in enumerate(self.regions):
            if not isinstance(region, Region):
                raise ValueError(f"`regions[{index}]` must be a Region, got {type(region).__name__}.")
        object.__setattr__(self, "attributes", as_attributes(self.attributes))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height


def region_to_dict(region: Region) -> dict[str, Any]:
    """Return a region as plain data; `region_from_dict` is the inverse."""
    flat = [value for point in region.points for value in point]
    fields: dict[str, Any] = {} if region.label is None else {"label": region.label}
    fields[region.kind] = flat if region.kind in ("point", "box") else [list(point) for point in region.points]
    if region.times:
        fields["times"] = list(region.times)
    if region.score is not None:
        fields["score"] = region.score
    if region.image:
        fields["image"] = region.image
    if region.identity is not None:
        fields["identity"] = region.identity
    if region.attributes:
        fields["attributes"] = dict(region.attributes)
    return fields


def region_from_dict(fields: Mapping[str, Any]) -> Region:
    """Return the region of plain data; the inverse of `region_to_dict`.

    Raises:
        ValueError: If it has no kind or two, an unknown key, or a value that is invalid for a region.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"A region must be an object, got {fields!r}.")
    kinds = [key for key in fields if key in KINDS]
    if len(kinds) != 1:
        raise ValueError(f"A region must have one of the keys {', '.join(KINDS)}, got {sorted(fields)}.")
    unknown = sorted(set(fields) - {kinds[0], *EXTRAS})
    if unknown:
        raise ValueError(f"A region can have the keys {', '.join(EXTRAS)} besides its kind, got {unknown}.")
    kind, given = kinds[0], fields[kinds[0]]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"`{kind}` must be a list, got {given!r}.")
    if kind in ("point", "box"):
        count = 2 * KINDS[kind][0]
        if len(given) != count:
            raise ValueError(f"`{kind}` must have {count} numbers, got {len(given)}.")
        given = [(given[index], given[index + 1]) for index in range(0, count, 2)]
    extras = {key: fields[key] for key in EXTRAS if key in fields}
    return Region(kind, tuple(given), **extras)


def _image_regions(fields: Mapping[str, Any]) -> ImageRegions:
    """Return the image and the regions of a line."""
    missing = sorted({"image", "width", "height"} - set(fields))
    if missing:
        raise ValueError(f"The keys image, width and height are required, missing: {', '.join(missing)}.")
    check_size((fields["width"], fields["height"]), "(width, height)")
    given = fields.get("regions", [])
    if not isinstance(given, list):
        raise ValueError(f"`regions` must be a list, got {given!r}.")
    regions = []
    for index, item in enumerate(given):
        try:
            regions.append(region_from_dict(item))
        except ValueError as error:
            raise ValueError(f"`regions[{index}]`: {error}") from None
    attributes = fields.get("attributes", NO_ATTRIBUTES)
    return ImageRegions(fields["image"], fields["width"], fields["height"], tuple(regions), attributes)


def read_annotations(path: str | Path) -> Iterator[ImageRegions]:
    """Read the images of a JSON Lines file, one line at a time. Unknown keys of a line are ignored.

    Yields:
        The image of each line that is not empty.

    Raises:
        ValueError: At the first invalid line, with the path, line number and reason; also if the file does not exist.
    """
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"`path` must be a JSON Lines file, got {source}, which does not exist.")
    with source.open("rb") as lines:
        for number, fields in read_json_lines(lines, str(source)):
            try:
                yield _image_regions(fields)
            except ValueError as error:
                raise ValueError(f"{source}, line {number}: {error}") from None


def write_annotations(images: Iterable[ImageRegions], path: str | Path) -> int:
    """Write images to a JSON Lines file, one line at a time; `read_annotations` is the exact inverse.

    Returns:
        The number of lines written.
    """
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        return write_json_lines(map(_line, images), file)


def _line(image: ImageRegions) -> dict[str, Any]:
    regions = [region_to_dict(region) for region in image.regions]
    fields = {"image": image.image, "width": image.width, "height": image.height, "regions": regions}
    return {**fields, "attributes": dict(image.attributes)} if image.attributes else fields


def training_record(image: ImageRegions, question: str, *, attributes: bool = True) -> dict[str, Any]:
    """Return a training record: a question about the image, and its regions as the answer.

    A record has the label, coordinates, image index and attributes of a region, but neither score nor identity, and no
    attributes of the image.

    Args:
        image: The image and its regions.
        question: The text of the user's message.
        attributes: Whether the record has the attributes of regions, which only JSON formats can write.

    Raises:
        ValueError: If there are no regions, or one is neither a box nor a point.
    """
    if not image.regions:
        raise ValueError(f"Image {image.image!r} has no regions, so the answer would be empty.")
    content = []
    for index, region in enumerate(image.regions):
        if region.kind not in ("box", "point"):
            raise ValueError(f"`regions[{index}]` must be a box or a point, got a {region.kind}.")
        fields = region_to_dict(region)
        kept = ("label", region.kind, "image", *(["attributes"] if attributes else []))
        content.append({key: fields[key] for key in kept if key in fields})
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
    return {"image": image.image, "messages": messages}


def record_regions(record: Mapping[str, Any], role: str = "assistant") -> list[Region]:
    """Return the regions in the messages of one role of a training record, in order.

    Raises:
        ValueError: If the record has no list of messages, or a region is invalid.
    """
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise ValueError(f"`messages` must be a list, got {messages!r}.")
    regions = []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) and message.get("role") == role else None
        for index, block in enumerate(content if isinstance(content, list) else [content]):
            if isinstance(block, Mapping) and not KINDS.keys().isdisjoint(block):
                try:
                    regions.append(region_from_dict(block))
                except ValueError as error:
                    raise ValueError(f"`messages[{number}].content[{index}]`: {error}") from None
    return regions
