"""Rewards for answers with coordinates, in the form that TRL's `GRPOTrainer` and `RLOOTrainer` take as `reward_funcs`.

They read answers by `decode` and need neither TRL nor torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ..coordinates.codec import CoordinateError, decode, encode
from ..coordinates.formats.registry import CoordinateFormat, get_format
from ..coordinates.grammars.base import Suspicion
from ..coordinates.metrics.matching import assign, similarity
from ..coordinates.regions import KINDS, Region
from ..coordinates.resolving import is_size
from ..coordinates.thinking import without_thinking
from ..coordinates.validation import check_choice

__all__ = ["CoordinateReward", "format_reward", "iou_reward", "point_in_box_reward"]

_MALFORMED = ("zero", "skip", "none")


class Answer(NamedTuple):
    """An answer, read.

    Attributes:
        text: The answer without reasoning.
        regions: Its regions that can be read, in pixels of the image.
        malformed: Whether there are others.
        image_size: Width and height of the image.
        format: The format.
    """

    text: str
    regions: Sequence[Region]
    malformed: bool
    image_size: tuple[int, int]
    format: CoordinateFormat


@dataclass(frozen=True)
class CoordinateReward:
    """A reward function: made by [`iou_reward`], [`format_reward`] or [`point_in_box_reward`].

    Args:
        name: Its name in the logs of a trainer.
        score: Computes the reward of an answer that is well-formed, or whose malformed regions are left out, given
            the true boxes.
        format: Format of the answers.
        boxes: Column with the true boxes of each row; None if `score` does not use them.
        labels: Column with their labels; None for boxes without labels.
        image_size: Column with the width and height of each image in pixels.
        on_malformed: See [`iou_reward`].
        skip_thinking: See [`iou_reward`].
        tokenizer: See [`iou_reward`].

    Raises:
        ValueError: If `on_malformed` is unknown.
    """

    name: str
    score: Callable[[Answer, list[Region]], float]
    format: CoordinateFormat
    boxes: str | None
    labels: str | None
    image_size: str
    on_malformed: str
    skip_thinking: bool
    tokenizer: Any = None

    def __post_init__(self) -> None:
        check_choice(self.on_malformed, "on_malformed", _MALFORMED)

    @property
    def __name__(self) -> str:
        """The name, which trainers log."""
        return self.name

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Compute the rewards of a batch.

        Args:
            completions: Answers, each a text or a list of messages, of which the last is the answer.
            **columns: Columns of the dataset, each with one value per answer; those that are not used are ignored.
                With a `tokenizer` also `completion_ids`, the token ids of the answers.

        Returns:
            One reward per answer; None where none is defined: for a row without true boxes (None), and for a malformed
            answer with `on_malformed="none"`.

        Raises:
            ValueError: If a column is missing or has a value that does not fit; names it.
        """
        count = len(completions)
        if self.tokenizer is not None:
            completions = [self._decode(ids) for ids in columns["completion_ids"]]
        sizes = self._column(columns, "image_size", count)
        boxes = [[]] * count if self.boxes is None else self._column(columns, "boxes", count)
        labels = [None] * count if self.labels is None else self._column(columns, "labels", count)
        return [self._reward(*row) for row in zip(completions, sizes, boxes, labels, strict=True)]

    def _decode(self, ids: Sequence[int]) -> str:
        """The text of an answer with its special tokens, but for those at its end."""
        ends = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        length = len(ids)
        while length and ids[length - 1] in ends:
            length -= 1
        text: str = self.tokenizer.decode(ids[:length], skip_special_tokens=False)
        return text

    def _column(self, columns: Mapping[str, Any], argument: str, count: int) -> Sequence[Any]:
        name = getattr(self, argument)
        if name not in columns:
            raise ValueError(
                f"`{argument}` of {self.name} is the column {name!r}, which the dataset lacks; it has "
                f"{', '.join(map(repr, columns))}."
            )
        values: Sequence[Any] = columns[name]
        if len(values) != count:
            raise ValueError(f"`{name}` must have {count} values, got {len(values)}.")
        return values

    def _reward(self, completion: Any, size: Any, boxes: Any, labels: Any) -> float | None:
        if boxes is None:
            return None
        answer = self._read(answer_text(completion), size)
        if answer.malformed and self.on_malformed != "skip":
            return 0.0 if self.on_malformed == "zero" else None
        return self.score(answer, self._true_boxes(boxes, labels))

    def _read(self, text: str, size: Any) -> Answer:
        if not is_size(size):
            raise ValueError(f"`{self.image_size}` must be width and height, two positive integers, got {size!r}.")
        width, height = size
        result = decode(text, (width, height), self.format, on_error="collect", skip_thinking=self.skip_thinking)
        malformed = any(not isinstance(error, Suspicion) for error in result.errors)
        text = without_thinking(text) if self.skip_thinking else text
        return Answer(text.strip(), result.regions, malformed, (width, height), self.format)

    def _true_boxes(self, boxes: Any, labels: Any) -> list[Region]:
        labels = [None] * len(boxes) if labels is None else labels
        if len(labels) != len(boxes):
            raise ValueError(f"`{self.labels}` must have one label per box, got {len(labels)} for {len(boxes)} boxes.")
        for box in boxes:
            if not isinstance(box, Sequence) or len(box) != 4:
                raise ValueError(f"`{self.boxes}` must be lists of x1, y1, x2, y2, got {box!r}.")
        return [Region.box(x1, y1, x2, y2, label) for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True)]


def answer_text(completion: Any) -> str:
    """Return the text of an answer: a text, or a list of messages, of which the last is the answer.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(completion, str):
        return completion
    try:
        content = completion[-1]["content"]
    except (IndexError, KeyError, TypeError):
        raise ValueError(f"`completions` must be texts or lists of messages, got {completion!r:.80}.") from None
    if isinstance(content, str | None):
        return content or ""
    return "".join(block["text"] for block in content if block["type"] == "text")


def iou_reward(
    format: CoordinateFormat | str | None = None,
    *,
    boxes: str = "boxes",
    labels: str | None = None,
    image_size: str = "image_size",
    on_malformed: str = "zero",
    skip_thinking: bool = False,
    tokenizer: Any = None,
) -> CoordinateReward:
    """Return a reward from 0 to 1: the mean IoU of predicted and true boxes.

    Predicted and true boxes are paired one-to-one such that the sum of IoUs is largest, and the sum is divided by the
    larger of both numbers. So a box that is missing counts as 0, and so does one too many, or a region of another
    kind. An answer without regions has the reward 1 if there are no true boxes, and otherwise 0.

    Args:
        format: Format of the answers or its name; None for openPangu's. For a model whose image processor crops, see
            [`as_seen`].
        boxes: Column with the true boxes: per row a list of x1, y1, x2, y2 in pixels of the image, or None for a row
            without reward.
        labels: Column with a label per box. If given, boxes with different labels have an IoU of 0.
        image_size: Column with width and height of the image in pixels: of the upright one for files with an EXIF
            orientation.
        on_malformed: Reward of an answer with a malformed region, for example one that is cut off: "zero"; "skip"
            leaves such regions out and scores the others; "none" gives no reward, which TRL leaves out of its sum.
        skip_thinking: Whether to leave out reasoning, see `decode`.
        tokenizer: Tokenizer that decodes the token ids of the answers, with all special tokens but those at the end;
            for formats and reasoning with marks that are special tokens, which TRL leaves out of the text. None to
            read the text.

    Raises:
        ValueError: If the format or `on_malformed` is unknown.
    """
    score = partial(_mean_similarity, kinds=tuple(set(KINDS) - {"point"}), labels=labels is not None)
    options = (get_format(format), boxes, labels, image_size, on_malformed, skip_thinking, tokenizer)
    return CoordinateReward("iou_reward", score, *options)


def point_in_box_reward(
    format: CoordinateFormat | str | None = None,
    *,
    boxes: str = "boxes",
    labels: str | None = None,
    image_size: str = "image_size",
    on_malformed: str = "zero",
    skip_thinking: bool = False,
    tokenizer: Any = None,
) -> CoordinateReward:
    """Return a reward from 0 to 1: the share of points that are in a true box of their own, edges included.

    As [`iou_reward`], with 1 for a point in a box instead of the IoU; regions other than points count as 0.

    Args:
        format: See [`iou_reward`], and for all others.
        boxes: Column with the true boxes.
        labels: Column with a label per box.
        image_size: Column with width and height of the image.
        on_malformed: "zero", "skip" or "none".
        skip_thinking: Whether to leave out reasoning.
        tokenizer: Tokenizer that decodes the token ids.

    Raises:
        ValueError: If the format or `on_malformed` is unknown.
    """
    score = partial(_mean_similarity, kinds=("point",), labels=labels is not None)
    options = (get_format(format), boxes, labels, image_size, on_malformed, skip_thinking, tokenizer)
    return CoordinateReward("point_in_box_reward", score, *options)


def format_reward(
    format: CoordinateFormat | str | None = None,
    *,
    kind: str | None = None,
    exact: bool = True,
    image_size: str = "image_size",
    skip_thinking: bool = False,
    tokenizer: Any = None,
) -> CoordinateReward:
    """Return a reward of 1 for a well-formed answer and 0 for any other.

    Args:
        format: Format of the answers or its name; None for openPangu's.
        kind: Kind of all regions, such as "box"; None for any.
        exact: Whether the answer must be what `encode` writes for its regions, up to spaces around it. If False, it
            needs at least one region and none that is malformed; other text and another layout are allowed.
        image_size: Column with width and height of the image in pixels.
        skip_thinking: Whether to leave out reasoning, see `decode`.
        tokenizer: Tokenizer that decodes the token ids, see [`iou_reward`].

    Raises:
        ValueError: If the format or `kind` is unknown.
    """
    if kind is not None:
        check_choice(kind, "kind", tuple(KINDS))
    score = partial(_well_formed, kind=kind, exact=exact)
    options = (get_format(format), None, None, image_size, "zero", skip_thinking, tokenizer)
    return CoordinateReward("format_reward", score, *options)


def _mean_similarity(answer: Answer, truth: list[Region], kinds: tuple[str, ...], labels: bool) -> float:
    """Sum of the similarities of the best pairs, divided by the larger number of regions."""
    size = max(len(answer.regions), len(truth))
    if size == 0:
        return 1.0
    predicted = [region for region in answer.regions if region.kind in kinds]
    similarities = similarity(predicted, truth, labels=labels)
    return float(sum(similarities[pair] for pair in assign(-similarities))) / size


def _well_formed(answer: Answer, truth: list[Region], kind: str | None, exact: bool) -> float:
    regions = answer.regions
    if not regions or any(region.kind != kind for region in regions if kind is not None):
        return 0.0
    if not exact:
        return 1.0
    try:
        return float(encode(regions, answer.image_size, answer.format) == answer.text)
    except CoordinateError:  # the format cannot write what it reads
        return 0.0
