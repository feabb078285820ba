"""The demo, in small."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

from vlparts.demo.data import Task
from vlparts.demo.run import ask_without_vlparts, run_demo


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    metrics = run_demo(tmp_path, steps=3, images=(24, 4))
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert metrics["count"] == 4
    assert metrics["steps"] == 3
    assert 0 <= metrics["mean_iou"] <= 1
    assert Image.open(tmp_path / "predictions.png").width > 500
    assert (tmp_path / "model" / "model.safetensors").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = {tokenizer.decode([token], skip_special_tokens=True).strip() for token in range(len(tokenizer))}
    answers = ask_without_vlparts(tmp_path / "model", tmp_path / "data" / "held_out.jsonl", tokens=1)
    assert len(answers) == 4
    assert set(answers) <= tokens


@pytest.mark.slow
def test_another_text_model(tmp_path: Path) -> None:
    metrics = run_demo(tmp_path, steps=2, images=(24, 2), text="moge:small")
    assert (metrics["text"], metrics["steps"], metrics["count"]) == ("moge:small", 2, 2)
    saved = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert saved["text_config"]["model_type"] == "vlparts_moge"
    assert (tmp_path / "model" / "modeling_moge.py").is_file()


@pytest.mark.slow
def test_the_time_is_kept(tmp_path: Path) -> None:
    metrics = run_demo(tmp_path, minutes=0.9, images=(64, 2))
    assert metrics["steps"] >= 1
    assert metrics["training_seconds"] < 54
    assert not [*(tmp_path / "model").glob("checkpoint-*")]


def test_more_digits_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`digits` must be in 1\.\.4, got 5"):
        Task(digits=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be an integer of at least 1, got 0"),
        ({"minutes": 0.1}, r"`minutes` must be more than 0\.5, got 0\.1"),
        ({"text": "none"}, "`text` must be one of qwen3:tiny, .*'none'"),
    ],
)
def test_impossible_settings(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path, **options)
