"""Evaluation of a model on records with fewer and fewer vision tokens: answers, regions, time and memory."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import LogitsProcessor

from .coordinates.codec import decode
from .coordinates.formats.registry import as_seen
from .coordinates.metrics.iou import paired_box_iou
from .coordinates.metrics.report import AREAS
from .parts.utils import positive_integer
from .token_reduction import reduce_tokens
from .training.encoding import SampleEncoder
from .training.filtering.answers import is_same_answer
from .training.records import Line, PageRecord, read_records

__all__ = ["Evaluation", "Interval", "Question", "evaluate_tokens", "read_questions", "write_evaluations"]

_RESAMPLES = 2000
_SAMPLE_SECONDS = 0.005  # between two looks at the memory of the process


@dataclass(frozen=True)
class Interval:
    """A mean over answers, with a 95 % confidence interval from a bootstrap over them.

    Args:
        mean: The mean.
        low: 2.5 % of the resampled means are below.
        high: 2.5 % are above.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Evaluation:
    """Results at one share of vision tokens.

    Args:
        token_ratio: The share; None for the model as it is.
        questions: Number of questions.
        image_tokens: Mean number of tokens of the images of a question.
        prompt_tokens: Mean number of tokens of a prompt.
        accuracy: Share of answers that are the same as the record's, see [`is_same_answer`]; regions are compared by
            their overlap alone.
        iou: Mean intersection over union of the first region of the answer with that of the record, 0 if the answer
            has none; None if no record has one region.
        first_token_seconds: Median time from a batch's pixels to the first token of its answers.
        seconds: Time of all batches.
        peak_mib: Most memory beyond what was taken before the first batch, in MiB.
        answers: The answers, in the order of the questions.
    """

    token_ratio: float | None
    questions: int
    image_tokens: float
    prompt_tokens: float
    accuracy: Interval | None
    iou: Interval | None
    first_token_seconds: float
    seconds: float
    peak_mib: float
    answers: list[str] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Question:
    """A record as a question: a conversation without its last answer.

    Args:
        messages: Chat messages, with the images in their blocks.
        expected: The text of the last answer.
        sizes: Width and height of each image in pixels.
        text: The text of the last turn before the answer.
    """

    messages: list[dict[str, Any]]
    expected: str
    sizes: list[tuple[int, int]]
    text: str


def read_questions(
    path: str | Path, processor: Any, *, limit: int | None = None, coordinate_format: str | None = None
) -> list[Question]:
    """Read records as questions; the last turn of the assistant is the expected answer.

    Args:
        path: JSON Lines file of records, as for training.
        processor: Processor of the model.
        limit: Number of records, from the first; None for all.
        coordinate_format: Name of the format of regions; None for the default.

    Raises:
        ValueError: If the file or a record is invalid, or a record has no answer or an image cannot be read.
    """
    if limit is not None:
        positive_integer(limit, "limit")
    records = read_records(path)
    encoder = SampleEncoder(processor, records.path.parent, coordinate_format=coordinate_format)
    return [_question(encoder, line, records.path) for line in records.lines[:limit]]


def _question(encoder: SampleEncoder, line: Line, path: Path) -> Question:
    record = line.record
    try:
        images = [encoder.open(record, one) for one in record.all_images]
        messages = encoder.render(record, [image.size for image in images])
    except ValueError as error:
        raise ValueError(f"{path}, line {line.number}: {error}") from None
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{path}, line {line.number}: expected an assistant turn, the answer, got none.")
    waiting = iter(images)
    asked = messages[: answers[-1]]
    for message in asked:
        for block in message["content"]:
            if block["type"] == "image":
                block["image"] = next(waiting)
    sizes = [] if isinstance(record, PageRecord) else [image.size for image in images]
    return Question(asked, _text(messages[answers[-1]]), sizes, _text(asked[-1]) if asked else "")


def _text(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def evaluate_tokens(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    token_ratios: Sequence[float] | None = None,
    *,
    method: str = "merge_similar",
    batch_size: int = 8,
    max_new_tokens: int = 64,
    coordinate_format: str | None = None,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Evaluation]:
    """Answer questions greedily, with several shares of the vision tokens.

    Args:
        model: A composed or native model in evaluation mode; see [`reduce_tokens`].
        processor: Its processor, with a chat template.
        questions: From [`read_questions`].
        token_ratios: Shares of the tokens of an image; None for the model as it is, which may reduce them itself.
        method: Method of [`reduce_tokens`].
        batch_size: Questions per batch.
        max_new_tokens: Most tokens of an answer.
        coordinate_format: Name of the format of regions; None for the default.
        seed: Seed of the confidence intervals.
        on_batch: Called with the number of questions of each batch that is done.
        **options: Options of the method.

    Returns:
        One result for each share.

    Raises:
        ValueError: If there are no questions, or the model cannot be evaluated with fewer tokens.
    """
    if not questions:
        raise ValueError("`questions` must hold at least one question, got none.")
    positive_integer(batch_size, "batch_size")
    positive_integer(max_new_tokens, "max_new_tokens")
    seen = as_seen(coordinate_format, processor)
    results = []
    for ratio in [None] if token_ratios is None else token_ratios:
        reduction = None if ratio is None else {"method": method, "ratio": ratio, **options}
        run = _Run(model, processor, reduction, max_new_tokens)
        began = time.perf_counter()
        with _peak_memory(model.device) as peak:
            for start in range(0, len(questions), batch_size):
                batch = questions[start : start + batch_size]
                run.answer(batch)
                if on_batch is not None:
                    on_batch(len(batch))
        seconds = time.perf_counter() - began
        ious = [_iou(*pair, seen) for pair in zip(run.answers, questions, strict=True)]
        known = [iou for iou in ious if iou is not None]
        texts = [
            float(is_same_answer(answer, one.expected, one.text))
            for answer, one, iou in zip(run.answers, questions, ious, strict=True)
            if iou is None
        ]
        results.append(
            Evaluation(
                token_ratio=ratio,
                questions=len(questions),
                image_tokens=run.image_tokens / len(questions),
                prompt_tokens=run.prompt_tokens / len(questions),
                accuracy=_interval(texts, seed),
                iou=_interval(known, seed),
                first_token_seconds=float(np.median(run.first_token_seconds)),
                seconds=seconds,
                peak_mib=peak() / 2**20,
                answers=run.answers,
            )
        )
    return results


def write_evaluations(results: Sequence[Evaluation], folder: str | Path, **settings: Any) -> None:
    """Write `evaluation.json` and the plot `evaluation.png` to a folder.

    Args:
        results: From [`evaluate_tokens`].
        folder: The folder, which is made.
        **settings: What the results depend on, as JSON data.
    """
    from .show import evaluations

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    data = {**settings, "results": rows}
    (path / "evaluation.json").write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    evaluations(rows, path=path / "evaluation.png")


class _FirstToken(LogitsProcessor):
    """Notes when the scores of the first token are there."""

    def __init__(self) -> None:
        self.time: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.time is None:
            if scores.device.type != "cpu":
                torch.accelerator.synchronize(scores.device)
            self.time = time.perf_counter()
        return scores


class _Run:
    """Answers of a model at one share of tokens, and what they took."""

    def __init__(self, model: Any, processor: Any, reduction: dict[str, Any] | None, max_new_tokens: int) -> None:
        self.model, self.processor, self.reduction = model, processor, reduction
        self.max_new_tokens = max_new_tokens
        self.answers: list[str] = []
        self.first_token_seconds: list[float] = []
        self.image_tokens = self.prompt_tokens = 0

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question]) -> None:
        """Answer the questions of a batch."""
        encoded = self.processor.apply_chat_template(
            [question.messages for question in questions],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        inputs: dict[str, Any] = dict(encoded.to(self.model.device))
        clock, began = _FirstToken(), time.perf_counter()
        if self.reduction is not None:
            inputs = reduce_tokens(self.model, inputs, **self.reduction)
        output = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, logits_processor=[clock]
        )
        self.first_token_seconds.append((clock.time or began) - began)
        ids = inputs["input_ids"]
        self.image_tokens += int((ids == self.processor.image_token_id).sum())
        self.prompt_tokens += int(inputs["attention_mask"].sum())
        texts = self.processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        self.answers += [text.strip() for text in texts]


def _iou(answer: str, question: Question, coordinate_format: Any) -> float | None:
    """Overlap of the first region of an answer with that of the record; None if the record has not one region."""
    if not question.sizes:
        return None
    sizes = question.sizes[0] if len(question.sizes) == 1 else question.sizes
    truth = decode(question.expected, sizes, coordinate_format, on_error="collect").regions
    if len(truth) != 1 or truth[0].kind not in AREAS:
        return None
    found = decode(answer, sizes, coordinate_format, on_error="collect").regions
    if not found or found[0].image != truth[0].image:
        return 0.0
    return float(paired_box_iou([found[0].xyxy], [truth[0].xyxy])[0])


def _interval(values: Sequence[float], seed: int) -> Interval | None:
    """Mean with its confidence interval; None without values."""
    if not values:
        return None
    array = np.asarray(values)
    drawn = np.random.default_rng(seed).integers(0, len(array), (_RESAMPLES, len(array)))
    low, high = np.quantile(array[drawn].mean(1), (0.025, 0.975))
    return Interval(float(array.mean()), float(low), float(high))


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measure the most memory that is taken inside, beyond what was taken before: of the device, or of the process."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        yield lambda: torch.accelerator.max_memory_allocated(device) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(_SAMPLE_SECONDS):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most - before
    finally:
        done.set()
        thread.join()
