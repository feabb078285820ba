"""The command `plan`: what it prints, JSON, records as the source of sizes, and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.tiny import picture, text_config, tokenizer, vision_config
from vlparts import compose, compose_processor
from vlparts.cli.main import app

TINY = ("--vision", "navit:tiny", "--text", "moge:tiny", "--devices", 2, "--memory", 1, "--image-size", "128x96")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["plan", *(str(one) for one in arguments)])


def test_tables_and_the_choice_are_printed() -> None:
    result = run(*TINY, "--capacity", 1024, "--sample-tokens", 256)
    assert result.exit_code == 0, result.output
    assert "active per token" in result.output
    assert "DDP is the first that fits" in result.output


def test_json_has_all_numbers() -> None:
    result = run(*TINY, "--capacity", 1024, "--sample-tokens", 256, "--tokens", 1e6, "--json", "--train", "projector")
    found = json.loads(result.stdout)
    assert found["run"]["samples"] == pytest.approx(1e6 / 256)
    assert found["parameters"]["vision"]["trained"] == 0 < found["parameters"]["projector"]["trained"]
    assert found["chosen"] == found["estimates"][-1]
    assert found["chosen"]["memory"]["peak"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-size", "big"), "`--image-size` must be WIDTHxHEIGHT in pixels, got 'big'"),
        (("--precision", "fp8"), "`--precision` must be one of mixed, float32, bfloat16, got 'fp8'"),
        (("--samples", 1, "--tokens", 1), "`--samples` and `--tokens` must not both be given"),
        (("--data", "x.jsonl"), "`--data` requires `--model` with the folder"),
        (("--data", "x.jsonl", "--samples", 1), "`--data` replaces --sample-tokens, --samples and --tokens"),
        (("--model", "nowhere"), "`model` must be one of"),
        (("--capacity", 0), "`capacity` must be positive, got 0"),
    ],
)
def test_bad_arguments_are_errors(arguments: tuple[Any, ...], message: str) -> None:
    start = ("--devices", 1, "--memory", 1) if "--model" in arguments else TINY
    result = run(*start, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_records_give_lengths_and_image_sizes(tmp_path: Path) -> None:
    words = tokenizer()
    model = compose(vision_config("navit"), text_config("qwen3", words))
    processor = compose_processor(model, words)
    model.config.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture(24, 16).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "Where is the cat?"}, {"role": "assistant", "content": "cat"}]
    (tmp_path / "data.jsonl").write_text((json.dumps({"image": "a.png", "messages": turns}) + "\n") * 3)
    arguments = ("--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--json")
    result = run("--devices", 1, "--memory", 1, *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["run"]
    assert found["samples"] == 3
    assert found["images_per_sample"] == 1
    grid = processor.image_processor(picture(24, 16), return_tensors="pt")["image_grid_thw"][0]
    assert found["image_size"] == [4 * int(grid[2]), 4 * int(grid[1])]
    assert found["sample_tokens"] > 1
