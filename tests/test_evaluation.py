"""Evaluation with fewer vision tokens: counts, answers, intervals, files, and the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.parts.test_vlm import composed
from tests.tiny import picture
from vlparts.cli.main import app
from vlparts.coordinates import Region, encode
from vlparts.evaluation import evaluate_tokens, read_questions, write_evaluations

BOX = {"box": [2, 3, 12, 9], "label": "cat"}


@pytest.fixture
def records(tmp_path: Path) -> Path:
    lines = []
    for index in range(5):
        picture(20 + 4 * index, 16).save(tmp_path / f"{index}.png")
        answer: Any = [BOX] if index % 2 else "yes"
        messages = [{"role": "user", "content": "Where is the cat?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"image": f"{index}.png", "messages": messages}))
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class Answering:
    """A model whose generated tokens are given texts."""

    def __init__(self, model: Any, processor: Any, answers: list[str]) -> None:
        self.model, self.tokenizer, self.answers = model, processor.tokenizer, iter(answers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, input_ids: torch.Tensor, logits_processor: list, **inputs: Any) -> torch.Tensor:
        logits_processor[0](input_ids, torch.zeros(len(input_ids), 5))
        texts = [next(self.answers) for _ in input_ids]
        rows = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat((input_ids, rows), dim=1)


def test_answers_and_counts(records: Path) -> None:
    model, processor = composed()
    questions = read_questions(records, processor)
    assert [one.expected for one in questions][:1] == ["yes"]
    assert questions[1].expected == encode([Region.box(2, 3, 12, 9, "cat")], (24, 16))
    results = evaluate_tokens(model, processor, questions, [1, 0.5], batch_size=2, max_new_tokens=4)
    counts = [(20 + 4 * index) // 4 * 4 for index in range(5)]
    assert [one.image_tokens for one in results] == [np.mean(counts), np.mean([count / 2 for count in counts])]
    assert results[0].prompt_tokens - results[1].prompt_tokens == np.mean(counts) / 2
    for one, question in zip(results[0].answers, questions, strict=True):
        inputs = processor.apply_chat_template(
            question.messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        alone = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(alone, skip_special_tokens=True).strip() == one
    assert all(one.first_token_seconds > 0 and one.seconds > 0 and one.peak_mib >= 0 for one in results)
    plain = evaluate_tokens(model, processor, questions, max_new_tokens=4)
    assert plain[0].token_ratio is None
    assert plain[0].answers == results[0].answers


def test_accuracy_and_overlap(records: Path, tmp_path: Path) -> None:
    model, processor = composed()
    questions = read_questions(records, processor)
    half = encode([Region.box(2, 3, 12, 6, "cat")], (24, 16))
    answers = ["Yes.", half, "no", "nothing", "yes"]
    (result,) = evaluate_tokens(Answering(model, processor, answers), processor, questions, batch_size=3)
    assert result.answers == answers
    assert result.accuracy.mean == pytest.approx(2 / 3)
    assert result.iou.mean == pytest.approx((3 / 6 + 0) / 2, abs=0.03)  # rounded to bins
    assert 0 <= result.accuracy.low < 2 / 3 < result.accuracy.high <= 1
    write_evaluations([result], tmp_path / "out", model="m")
    data = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert data["model"] == "m"
    assert data["results"][0]["answers"] == answers
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 5000


def test_intervals_narrow_with_more_answers() -> None:
    from vlparts.evaluation import _interval

    few, many = _interval([0.0, 1.0] * 10, 0), _interval([0.0, 1.0] * 1000, 0)
    assert few.mean == many.mean == 0.5
    assert few.high - few.low == pytest.approx(2 * 1.96 * 0.5 / 20**0.5, rel=0.15)
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / 2000**0.5, rel=0.15)
    assert _interval([], 0) is None
    constant = _interval([1.0] * 5, 0)
    assert (constant.low, constant.high) == (1.0, 1.0)


def test_a_model_that_reduces_its_tokens_is_evaluated_as_it_is(records: Path) -> None:
    model, processor = composed(token_reduction="merge_similar", token_ratio=0.5)
    questions = read_questions(records, processor, limit=2)
    (result,) = evaluate_tokens(model, processor, questions, max_new_tokens=2)
    assert result.image_tokens == (10 + 12) / 2
    with pytest.raises(ValueError, match="`model` reduces its tokens itself"):
        evaluate_tokens(model, processor, questions, [0.5])


def test_records_that_do_not_fit(records: Path, tmp_path: Path) -> None:
    model, processor = composed()
    with pytest.raises(ValueError, match="`questions` must hold at least one question"):
        evaluate_tokens(model, processor, [])
    with pytest.raises(ValueError, match="`limit` must be"):
        read_questions(records, processor, limit=0)
    lost = tmp_path / "lost.jsonl"
    lost.write_text(records.read_text(encoding="utf-8").splitlines()[0].replace("0.png", "none.png"), encoding="utf-8")
    with pytest.raises(ValueError, match="lost.jsonl, line 1: "):
        read_questions(lost, processor)


def saved(folder: Path) -> Path:
    model, processor = composed()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_command(records: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    arguments = [
        "--model",
        str(folder),
        "--data",
        str(records),
        "--max-new-tokens",
        "3",
        "--output",
        str(tmp_path / "out"),
    ]
    ratios = ["--token-ratio", "1", "0.5", "0.25"]
    result = CliRunner().invoke(app, ["evaluate", *arguments, *ratios], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert [one["token_ratio"] for one in data["results"]] == [1.0, 0.5, 0.25]
    assert [len(one["answers"]) for one in data["results"]] == [5, 5, 5]
    for ratio in ("0.5", "0.25", "accuracy", "IoU", "first token"):
        assert ratio in result.output
    plain = CliRunner().invoke(app, ["evaluate", *arguments[:6], "--limit", "2"], env={"COLUMNS": "200"})
    assert plain.exit_code == 0, plain.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-ratio", "0"], "`ratio` must be above 0 and at most 1, got 0.0"),
        (["0.5"], "Numbers must follow `--token-ratio`"),
        (["--token-ratio", "0.5", "--method", "resampler"], "'resampler' takes `count`"),
    ],
)
def test_options_of_the_command_that_do_not_fit(
    records: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    folder = saved(tmp_path / "model")
    result = CliRunner().invoke(app, ["evaluate", "--model", str(folder), "--data", str(records), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
