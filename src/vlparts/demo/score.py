"""How good the answers are."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..coordinates.codec import decode, encode
from ..coordinates.metrics.iou import box_iou
from ..coordinates.regions import Region


@dataclass(frozen=True)
class Score:
    """Figures over a set of answers.

    Args:
        count: Number of answers.
        well_formed: Share of answers that are exactly one labelled box in the right grammar, with nothing around it.
        right_label: Share of answers that are well-formed and name the digit that was asked for.
        mean_iou: Mean intersection over union with the true box; 0 for an answer that is not well-formed.
        iou_above_half: Share of answers with an intersection over union above 1/2.
        mean_iou_of_constant: What the best single box, placed relative to the image, would reach without looking.
    """

    count: int
    well_formed: float
    right_label: float
    mean_iou: float
    iou_above_half: float
    mean_iou_of_constant: float

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def read_answers(questions: Path, answers: list[str]) -> list[dict[str, Any]]:
    """Join each question's image, true box and answer.

    Args:
        questions: The file of records that was asked.
        answers: One text for each record.

    Returns:
        For each record the `image`, the true `Region` under `truth`, the `predicted` Region or None, and the `answer`.
    """
    lines = questions.read_text(encoding="utf-8").splitlines()
    items = []
    for line, answer in zip(lines, answers, strict=True):
        record = json.loads(line)
        with Image.open(questions.parent / record["image"]) as opened:
            image = opened.convert("RGB")
        wanted = record["messages"][-1]["content"][0]
        x1, y1, x2, y2 = wanted["box"]
        truth = Region.box(x1, y1, x2, y2, wanted["label"])
        result = decode(answer, image.size, on_error="collect")
        one_box = [region.kind for region in result.regions] == ["box"]
        whole = one_box and encode(result.regions, image.size) == answer
        predicted = result.regions[0] if whole else None
        items.append({"image": image, "truth": truth, "predicted": predicted, "answer": answer})
    return items


def score(items: list[dict[str, Any]]) -> Score:
    """Compute the figures of [`Score`] over items of [`read_answers`]."""
    overlaps = np.array([_iou(item["predicted"], item["truth"]) for item in items])
    formed = np.array([item["predicted"] is not None for item in items])
    right = [item["predicted"] is not None and item["predicted"].label == item["truth"].label for item in items]
    return Score(
        count=len(items),
        well_formed=float(formed.mean()),
        right_label=float(np.mean(right)),
        mean_iou=float(overlaps.mean()),
        iou_above_half=float((overlaps > 0.5).mean()),
        mean_iou_of_constant=_constant(items),
    )


def _iou(predicted: Region | None, truth: Region) -> float:
    return 0.0 if predicted is None else float(box_iou([predicted.xyxy], [truth.xyxy])[0, 0])


def _constant(items: list[dict[str, Any]]) -> float:
    """Mean overlap of the best centred box over a grid of sizes, the same share of every image."""
    sizes = np.array([item["image"].size for item in items], dtype=np.float64)
    truths = np.array([item["truth"].xyxy for item in items])
    best = 0.0
    for width in np.linspace(0.1, 1.0, 19):
        for height in np.linspace(0.1, 1.0, 19):
            half = np.stack([width * sizes[:, 0], height * sizes[:, 1]], 1) / 2
            boxes = np.concatenate([sizes / 2 - half, sizes / 2 + half], 1)
            best = max(best, float(np.diagonal(box_iou(boxes, truths)).mean()))
    return best
