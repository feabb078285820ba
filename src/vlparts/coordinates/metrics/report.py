"""The numbers that people quote of models that answer with regions, from their text answers.

Every number is defined at its field in [`Report`]. Answers are read as they are: a broken region counts as none, and
what else the text holds is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..codec import CoordinateError, ImageSizes, decode, encode
from ..formats.registry import CoordinateFormat, get_format
from ..regions import Region
from .iou import contains, paired_box_iou
from .matching import match_regions

__all__ = ["Detection", "Report", "report"]

AREAS = ("box", "quad", "polygon")


@dataclass(frozen=True)
class Detection:
    """Regions found at one threshold, over all answers together.

    Within an answer, the regions read and the true ones are paired one to one so that the most pairs arise with a
    similarity of at least `threshold`, of equal labels and in the same image (`match_regions(..., method="optimal")`).

    Attributes:
        threshold: Least IoU of bounds. A point that was read has 1 in a true box, quad or polygon, and else 0.
        precision: Pairs divided by regions read; None where none was read.
        recall: Pairs divided by true regions; None where there are none.
        f1: `2 * pairs / (read + true)`; None where both are none.
    """

    threshold: float
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Report:
    """Numbers of a list of answers. A share or mean over nothing is None.

    Attributes:
        answers: Number of answers.
        regions_read: Number of regions that could be read, in all answers.
        regions_true: Number of true regions, in all answers.
        adherence: Format adherence: share of answers that are written in the format and nothing else, that is, reading
            gives no error and writing what was read gives the same text, spaces at the ends aside. An answer without a
            region adheres only if there is none to find and it holds what the format writes for none.
        readable: Share of answers without a broken region; other text may stand around the regions.
        errors: Number of broken regions, in all answers.
        single: Number of answers with exactly one true region that is a box, quad or polygon. The next three are over
            these; the first region of the answer is taken, whatever its label, and an answer without one counts as
            wrong.
        accuracy: Share with IoU above 0.5 (of bounds), as for referring expressions (RefCOCO, "accuracy at 0.5").
            Some published code counts an IoU of exactly 0.5 as well: `report(..., half_counts=True)`.
        mean_iou: Mean IoU of bounds, 0 for an answer without a region.
        pointing: Pointing accuracy: share where the point lies in the true region, its edge included. The point of a
            region of another kind is the middle of its bounds.
        count_exact: Share of answers with as many regions as there are true ones.
        count_near: Share of answers with at most one region more or less.
        count_error: Mean of the absolute difference of the two numbers.
        detection: Precision, recall and F1 for each threshold.
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
        """All numbers as plain data, ready for JSON."""
        return {**asdict(self), "detection": [asdict(detection) for detection in self.detection]}

    def __str__(self) -> str:
        """A line for each number."""
        rows = [
            ("answers", str(self.answers)),
            ("regions read / true", f"{self.regions_read} / {self.regions_true}"),
            ("in the format, nothing else", _percent(self.adherence)),
            ("without a broken region", f"{_percent(self.readable)} ({self.errors} broken)"),
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
    """Whether writing the regions gives the text again."""
    try:
        return encode(regions, size, fmt, on_outside="clamp").strip() == text.strip()
    except CoordinateError:  # what was read cannot be written so, a label for one
        return False


def _check(answers: object, truths: object, image_sizes: object) -> None:
    """Raise ValueError unless there is a list of regions and a size for each answer."""
    for name, value in (("answers", answers), ("truths", truths), ("image_sizes", image_sizes)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"{name} must be a sequence, one item for each answer, got {type(value).__name__}")
    lengths = [len(value) for value in (answers, truths, image_sizes)]  # type: ignore[arg-type]
    if len(set(lengths)) != 1:
        raise ValueError(f"answers, truths and image_sizes must be of one length, got {lengths}")
    for index, (answer, truth) in enumerate(zip(answers, truths, strict=True)):  # type: ignore[call-overload]
        if not isinstance(answer, str):
            raise ValueError(f"answers[{index}] must be a str, got {type(answer).__name__}")
        if not isinstance(truth, Sequence) or not all(isinstance(region, Region) for region in truth):
            raise ValueError(f"truths[{index}] must be a sequence of Region, got {truth!r}")


def report(
    answers: Sequence[str],
    truths: Sequence[Sequence[Region]],
    image_sizes: Sequence[ImageSizes],
    format: CoordinateFormat | str | None = None,
    *,
    thresholds: Sequence[float] = (0.5, 0.75),
    labels: bool = True,
    half_counts: bool = False,
) -> Report:
    """Compare text answers with the truth.

    Args:
        answers: n texts of a model.
        truths: For each answer the true regions, in pixels of the original image.
        image_sizes: For each answer the (width, height) of its image, or a sequence of them for several images.
        format: The format of the answers or its name; the default format where None.
        thresholds: Of `Report.detection`.
        labels: Whether regions must have equal labels to be paired; False for answers that name no labels.
        half_counts: Whether an IoU of exactly 0.5 counts in `Report.accuracy`.

    Returns:
        The numbers.

    Raises:
        ValueError: If lengths differ, something is of another type, a threshold is not in (0, 1], or a size or the
            format is unknown.
    """
    fmt = get_format(format)
    _check(answers, truths, image_sizes)
    if not all(isinstance(value, (int, float)) and 0 < value <= 1 for value in thresholds):
        raise ValueError(f"thresholds must lie in (0, 1], got {tuple(thresholds)}")
    results = [decode(text, size, fmt, on_error="collect") for text, size in zip(answers, image_sizes, strict=True)]
    read = [result.regions for result in results]
    errors = [len(result.errors) for result in results]
    adheres = [
        not broken and (bool(regions) or not truth) and _adheres(text, regions, size, fmt)
        for text, regions, truth, size, broken in zip(answers, read, truths, image_sizes, errors, strict=True)
    ]
    first = [
        (regions[0] if regions else None, truth[0])
        for regions, truth in zip(read, truths, strict=True)
        if len(truth) == 1 and truth[0].kind in AREAS
    ]
    ious = [0.0 if guess is None or guess.image != true.image else _iou(guess, true) for guess, true in first]
    off = [abs(len(regions) - len(truth)) for regions, truth in zip(read, truths, strict=True)]
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
        pointing=_mean([guess is not None and _points_at(guess, true) for guess, true in first]),
        count_exact=_mean([count == 0 for count in off]),
        count_near=_mean([count <= 1 for count in off]),
        count_error=_mean(off),
        detection=tuple(_detection(read, truths, float(threshold), labels) for threshold in thresholds),
    )


def _iou(first: Region, second: Region) -> float:
    return float(paired_box_iou([first.xyxy], [second.xyxy])[0])


def _points_at(guess: Region, true: Region) -> bool:
    """Whether the point, or the middle of the bounds, lies in the true region."""
    x1, y1, x2, y2 = guess.xyxy
    return guess.image == true.image and contains(true, x1 + (x2 - x1) / 2, y1 + (y2 - y1) / 2)


def _detection(
    read: Sequence[Sequence[Region]], truths: Sequence[Sequence[Region]], threshold: float, labels: bool
) -> Detection:
    """Count the pairs of all answers at one threshold."""
    pairs = sum(
        len(match_regions(regions, truth, threshold, method="optimal", labels=labels))
        for regions, truth in zip(read, truths, strict=True)
    )
    found, there = sum(map(len, read)), sum(map(len, truths))
    return Detection(threshold, _ratio(pairs, found), _ratio(pairs, there), _ratio(2 * pairs, found + there))
