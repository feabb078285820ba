"""`train --recipe` on the command line: plan, stages, summary, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.training.recipe_making import fields, write_data, write_recipe
from vlparts.cli import main as command_line


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line.console, "width", 300)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return write_recipe(tmp_path, fields(tmp_path))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command_line.app, ["train", *(str(one) for one in arguments)])


def test_a_plan_and_then_the_stages(recipe: Path, tmp_path: Path) -> None:
    steps = ("--set", "defaults.max_steps=1", "--set", "instruction.learning_rates={text: 1e-3}")
    options = ("--recipe", recipe, "--output", tmp_path / "other", *steps)
    checked = run(*options, "--check")
    assert checked.exit_code == 0, checked.output
    assert not (tmp_path / "other").exists()
    row = next(line for line in checked.output.splitlines() if "projector" in line)
    assert re.search(r"projector .* projector .* 2,112 of 5\d,\d{3} .* captions\.jsonl 100% .* 8 .* of 200 .* 1 ", row)
    assert "chats.jsonl 70%" in checked.output
    assert "text 0.001" in checked.output
    done = run(*options)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "other" / "instruction" / "model.safetensors").is_file()
    assert not (tmp_path / "out").exists()
    for number, name in enumerate(("encoder", "projector", "instruction"), start=1):
        assert f"Stage {number} of 3: {name} ─" in done.output
        assert re.search(rf"{name}\W+1\W+\d+\.\d{{4}}\W+\d+\.\d{{4}}\W+{tmp_path}/other/{name}", done.output)
    assert done.output.rstrip().endswith(f"Model in {tmp_path / 'other' / 'instruction'}.")
    assert "Stage 2 of 3: projector, finished before" in run(*options).output
    changed = run(*options, "--set", "encoder.seed=3")
    assert changed.exit_code == 2
    assert "has results of a run with other settings (encoder.seed: 0, now 3)" in changed.stderr
    assert json.loads((tmp_path / "other" / "recipe.jsonl").read_text().splitlines()[1])["stage"] == "encoder"


INVALID: dict[str, tuple[list[str], str]] = {
    "other options": (
        ["--capacity", "3", "--seed", "2"],
        "takes --output, --set and --check only, got capacity, seed",
    ),
    "settings": (["--config", "a.yaml"], "takes --output, --set and --check only, got config"),
    "no value": (["--set", "projector.epochs"], "`--set` must be STAGE.FIELD=VALUE, got 'projector.epochs'"),
    "no YAML": (["--set", "projector.epochs=["], "`--set` projector.epochs must have a YAML value, got '['"),
    "no stage": (
        ["--set", "none.epochs=1"],
        "'none.epochs' must be output, defaults.FIELD or STAGE.FIELD; the stages",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_options_that_a_recipe_does_not_take(recipe: Path, tmp_path: Path, name: str) -> None:
    arguments, message = INVALID[name]
    result = run("--recipe", recipe, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_options_of_recipes_alone() -> None:
    for option in (["--check"], ["--set", "a.b=1"]):
        result = run("--data", "a", "--output", "b", *option)
        assert result.exit_code == 2
        assert "`--set` and `--check` must be given with `--recipe` only" in result.stderr


def test_names_of_published_recipes() -> None:
    result = run("--recipe", "points_1_5", "--output", "out", "--check")
    assert result.exit_code == 2
    assert "stage `pretraining`: `data`, `prompts`, `vision`, `text` must be set" in result.stderr
    result = run("--recipe", "points", "--output", "out")
    assert "`recipe` points cannot be read" in result.stderr
