"""Metrics of the demo's answers."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..coordinates.codec import decode, encode
from ..coordinates.metrics.iou import box_iou
from ..coordinates.regions import Region
from ..parts.image_files import open_image


@dataclass(frozen=True)
class Score:
    """Metrics over a set of answers.

    Args:
        count: Number of answers.
        well_formed: Fraction of answers that are exactly one box in the expected grammar, without other text.
        right_label: Fraction of answers that are well-formed and have the label in question.
        mean_iou: Mean intersection over union with the true box; 0 for answers that are not well-formed.
        iou_above_half: Fraction of answers with an intersection over union above 1/2.
        mean_iou_of_constant: Mean intersection over union of the best constant box, relative to the image size.
    """

    count: int
    well_formed: float
    right_label: float
    mean_iou: float
    iou_above_half: float
    mean_iou_of_constant: float

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics by name."""
        return asdict(self)


def read_answers(questions: Path, answers: list[str]) -> list[dict[str, Any]]:
    """Join the image, true box and answer of each record.

    Args:
        questions: JSON Lines file of records.
        answers: One answer per record.

    Returns:
        Per record a dict with the `image`, the true `Region` as `truth`, the `predicted` Region or None, and the
        `answer`.
    """
    lines = questions.read_text(encoding="utf-8").splitlines()
    items = []
    for line, answer in zip(lines, answers, strict=True):
        record = json.loads(line)
        image = open_image(questions.parent / record["image"])
        wanted = record["messages"][-1]["content"][0]
        x1, y1, x2, y2 = wanted["box"]
        truth = Region.box(x1, y1, x2, y2, wanted["label"])
        result = decode(answer, image.size, on_error="collect")
        one_box = [region.kind for region in result.regions] == ["box"]
        well_formed = one_box and encode(result.regions, image.size) == answer
        predicted = result.regions[0] if well_formed else None
        items.append({"image": image, "truth": truth, "predicted": predicted, "answer": answer})
    return items


def score(items: list[dict[str, Any]]) -> Score:
    """Compute the metrics over the items of [`read_answers`]."""
    ious = np.array([_iou(item["predicted"], item["truth"]) for item in items])
    well_formed = np.array([item["predicted"] is not None for item in items])
    right_label = [item["predicted"] is not None and item["predicted"].label == item["truth"].label for item in items]
    return Score(
        count=len(items),
        well_formed=float(well_formed.mean()),
        right_label=float(np.mean(right_label)),
        mean_iou=float(ious.mean()),
        iou_above_half=float((ious > 0.5).mean()),
        mean_iou_of_constant=_mean_iou_of_constant(items),
    )


def _iou(predicted: Region | None, truth: Region) -> float:
    return 0.0 if predicted is None else float(box_iou([predicted.xyxy], [truth.xyxy])[0, 0])


def _mean_iou_of_constant(items: list[dict[str, Any]]) -> float:
    """Mean IoU of the best centred box, searched over a grid of sizes relative to the image."""
    sizes = np.array([item["image"].size for item in items], dtype=np.float64)
    truths = np.array([item["truth"].xyxy for item in items])
    best = 0.0
    for width in np.linspace(0.1, 1.0, 19):
        for height in np.linspace(0.1, 1.0, 19):
            half = np.stack([width * sizes[:, 0], height * sizes[:, 1]], 1) / 2
            boxes = np.concatenate([sizes / 2 - half, sizes / 2 + half], 1)
            best = max(best, float(np.diagonal(box_iou(boxes, truths)).mean()))
    return best
