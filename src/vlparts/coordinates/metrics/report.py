"""Metrics of text answers that contain regions, defined at the fields of [`Report`].

A malformed region does not count as a region; other text in an answer, and reasoning before it, are ignored.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..codec import CoordinateError, ImageSizes, decode, encode
from ..formats.registry import CoordinateFormat, get_format
from ..regions import Region
from ..thinking import without_thinking
from .iou import contains, paired_box_iou
from .matching import match_regions

__all__ = ["Detection", "Report", "report"]

AREAS = ("box", "quad", "polygon")


@dataclass(frozen=True)
class Detection:
    """Precision, recall and F1 at one threshold, over all answers together.

    Within an answer, the regions read and the true ones are paired one-to-one, with the maximum number of pairs with a
    similarity of at least `threshold`, equal labels and the same image (`match_regions(..., method="optimal")`).

    Attributes:
        threshold: Minimum IoU of bounding boxes. For a point that was read, the IoU is 1 inside a true box, quad or
            polygon, and 0 otherwise.
        precision: Pairs divided by regions read; None if none was read.
        recall: Pairs divided by true regions; None if there are none.
        f1: `2 * pairs / (read + true)`; None if there are neither.
    """

    threshold: float
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Report:
    """Metrics of a list of answers. A share or mean over nothing is None.

    Attributes:
        answers: Number of answers.
        regions_read: Number of regions read, in all answers.
        regions_true: Number of true regions, in all answers.
        adherence: Format adherence: share of answers that contain only text of the format, that is, reading gives no
            error and writing the regions read gives the same text, up to spaces at the ends. An answer without a
            region adheres only if there is no true region and it is what the format writes for none.
        readable: Share of answers without a malformed region; there may be other text around the regions.
        errors: Number of malformed regions, in all answers.
        single: Number of answers with exactly one true region that is a box, quad or polygon. The next three
            metrics are over these answers and use the first region of the answer, with any label; an answer without
            one counts as wrong.
        accuracy: Share with an IoU of bounding boxes above 0.5, as for referring expressions (RefCOCO, "accuracy at
            0.5"). Some published code also counts an IoU of exactly 0.5: `report(..., half_counts=True)`.
        mean_iou: Mean IoU of bounding boxes, 0 for an answer without a region.
        pointing: Pointing accuracy: share with the point inside the true region or on its edge. The point of a region
            of another kind is the centre of its bounding box.
        count_exact: Share of answers with as many regions as true ones.
        count_near: Share of answers with at most one region more or less.
        count_error: Mean absolute difference of the numbers of regions read and true regions.
        detection: Precision, recall and F1 per threshold.
    """

    answers: int
    regions_read: int
    regions_true: int
    adherence: float | None
    readable: float | None
    errors: int
    single: int
    accuracy: float | None
    mean_iou: float | None
    pointing: float | None
    count_exact: float | None
    count_near: float | None
    count_error: float | None
    detection: tuple[Detection, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return all metrics as plain data for JSON."""
        return {**asdict(self), "detection": [asdict(detection) for detection in self.detection]}

    def __str__(self) -> str:
        """Return one line per metric."""
        rows = [
            ("answers", str(self.answers)),
            ("regions read / true", f"{self.regions_read} / {self.regions_true}"),
            ("format adherence", _percent(self.adherence)),
            ("without malformed regions", f"{_percent(self.readable)} ({self.errors} malformed)"),
            ("answers with one true region", str(self.single)),
            ("  accuracy at IoU 0.5", _percent(self.accuracy)),
            ("  mean IoU", _number(self.mean_iou)),
            ("  pointing accuracy", _percent(self.pointing)),
            ("count exact", _percent(self.count_exact)),
            ("count at most one off", _percent(self.count_near)),
            ("mean error of count", _number(self.count_error)),
        ]
        for found in self.detection:
            values = f"{_percent(found.precision)} / {_percent(found.recall)} / {_percent(found.f1)}"
            rows.append((f"precision / recall / F1 at {found.threshold:g}", values))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _adheres(text: str, regions: Sequence[Region], size: ImageSizes, fmt: CoordinateFormat) -> bool:
    """Whether writing the regions gives the same text."""
    try:
        return encode(regions, size, fmt, on_outside="clamp", on_attributes="omit").strip() == text.strip()
    except CoordinateError:  # the regions cannot be written, for instance because of a label
        return False


def _check(answers: object, truths: object, image_sizes: object) -> None:
    """Raise ValueError unless there are a list of regions and a size per answer."""
    for name, value in (("answers", answers), ("truths", truths), ("image_sizes", image_sizes)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"`{name}` must be a sequence with one item per answer, got {type(value).__name__}.")
    lengths = [len(value) for value in (answers, truths, image_sizes)]  # type: ignore[arg-type]
    if len(set(lengths)) != 1:
        raise ValueError(f"`answers`, `truths` and `image_sizes` must have the same length, got {lengths}.")
    for index, (answer, truth) in enumerate(zip(answers, truths, strict=True)):  # type: ignore[call-overload]
        if not isinstance(answer, str):
            raise ValueError(f"`answers[{index}]` must be a str, got {type(answer).__name__}.")
        if not isinstance(truth, Sequence) or not all(isinstance(region, Region) for region in truth):
            raise ValueError(f"`truths[{index}]` must be a sequence of Region, got {truth!r}.")


def report(
    answers: Sequence[str],
    truths: Sequence[Sequence[Region]],
    image_sizes: Sequence[ImageSizes],
    format: CoordinateFormat | str | None = None,
    *,
    thresholds: Sequence[float] = (0.5, 0.75),
    labels: bool = True,
    half_counts: bool = False,
    skip_thinking: bool = True,
) -> Report:
    """Compare text answers with the truth.

    Args:
        answers: n texts of a model.
        truths: The true regions per answer, in pixels of the original image.
        image_sizes: The (width, height) of the image per answer, or a sequence of them for several images.
        format: The format of the answers or its name; None for openPangu's.
        thresholds: Thresholds of `Report.detection`.
        labels: Whether regions must have equal labels to be paired; False for answers without labels.
        half_counts: Whether an IoU of exactly 0.5 counts in `Report.accuracy`.
        skip_thinking: Whether reasoning, such as between `<think>` and `</think>`, is no part of an answer, see
            [`decode`].

    Returns:
        The metrics.

    Raises:
        ValueError: If lengths differ, a type is wrong, a threshold is not in (0, 1], a size is invalid, or the format
            is unknown.
    """
    fmt = get_format(format)
    _check(answers, truths, image_sizes)
    if not all(isinstance(value, (int, float)) and 0 < value <= 1 for value in thresholds):
        raise ValueError(f"`thresholds` must be in (0, 1], got {tuple(thresholds)}.")
    if skip_thinking:
        answers = [without_thinking(text) for text in answers]
    results = [decode(text, size, fmt, on_error="collect") for text, size in zip(answers, image_sizes, strict=True)]
    read = [result.regions for result in results]
    errors = [len(result.errors) for result in results]
    adheres = [
        not malformed and (bool(regions) or not truth) and _adheres(text, regions, size, fmt)
        for text, regions, truth, size, malformed in zip(answers, read, truths, image_sizes, errors, strict=True)
    ]
    first = [
        (regions[0] if regions else None, truth[0])
        for regions, truth in zip(read, truths, strict=True)
        if len(truth) == 1 and truth[0].kind in AREAS
    ]
    ious = [
        0.0 if predicted is None or predicted.image != true.image else _iou(predicted, true)
        for predicted, true in first
    ]
    count_errors = [abs(len(regions) - len(truth)) for regions, truth in zip(read, truths, strict=True)]
    return Report(
        answers=len(answers),
        regions_read=sum(map(len, read)),
        regions_true=sum(map(len, truths)),
        adherence=_mean(adheres),
        readable=_mean([not count for count in errors]),
        errors=sum(errors),
        single=len(first),
        accuracy=_mean([iou > 0.5 or (half_counts and iou == 0.5) for iou in ious]),
        mean_iou=_mean(ious),
        pointing=_mean([predicted is not None and _points_at(predicted, true) for predicted, true in first]),
        count_exact=_mean([count == 0 for count in count_errors]),
        count_near=_mean([count <= 1 for count in count_errors]),
        count_error=_mean(count_errors),
        detection=tuple(_detection(read, truths, float(threshold), labels) for threshold in thresholds),
    )


def _iou(first: Region, second: Region) -> float:
    return float(paired_box_iou([first.xyxy], [second.xyxy])[0])


def _points_at(predicted: Region, true: Region) -> bool:
    """Whether the point, or the centre of the bounding box, is in the true region."""
    x1, y1, x2, y2 = predicted.xyxy
    return predicted.image == true.image and contains(true, x1 + (x2 - x1) / 2, y1 + (y2 - y1) / 2)


def _detection(
    read: Sequence[Sequence[Region]], truths: Sequence[Sequence[Region]], threshold: float, labels: bool
) -> Detection:
    """Return precision, recall and F1 of all answers at one threshold."""
    pairs = sum(
        len(match_regions(regions, truth, threshold, method="optimal", labels=labels))
        for regions, truth in zip(read, truths, strict=True)
    )
    found, true = sum(map(len, read)), sum(map(len, truths))
    return Detection(threshold, _ratio(pairs, found), _ratio(pairs, true), _ratio(2 * pairs, found + true))
