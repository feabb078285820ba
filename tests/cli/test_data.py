"""The command `data filter`: options passed on, what it prints, and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer.main
from click.testing import Result
from typer.testing import CliRunner

from tests.training.filtering.making import asked, language_model
from vlparts.cli.main import app
from vlparts.training.filtering import FilterSummary


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in language_model():
        part.save_pretrained(folder)
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["data", "filter", *(str(one) for one in arguments)])


def write(folder: Path, answers: list[str]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(asked("What?", answer)) + "\n" for answer in answers), encoding="utf-8")
    return path


def test_a_file_is_filtered(saved: Path, tmp_path: Path) -> None:
    data, output = write(tmp_path, [*(f"a cat {index}" for index in range(9)), ""]), tmp_path / "out.jsonl"
    result = run(data, "--model", saved, "-o", output, "--report", tmp_path / "report.jsonl", "--keep", 0.5)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    note, summary = result.stderr.splitlines()[-2:]
    assert note == "line 10: The text has no token to score."
    assert summary.startswith("4 of 10 records kept; dropped: 1 empty, 5 perplexity. Largest perplexity: ")
    assert len(output.read_text(encoding="utf-8").splitlines()) == 4
    assert len((tmp_path / "report.jsonl").read_text(encoding="utf-8").splitlines()) == 10


def test_many_notes_are_counted(saved: Path, tmp_path: Path) -> None:
    result = run(write(tmp_path, ["a cat", *[""] * 25]), "--model", saved, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert "line 21: " in result.stderr
    assert "line 22: " not in result.stderr
    assert "5 further records are empty or invalid; `--report` writes all." in result.stderr


def test_every_option_reaches_the_filter(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "vlparts.training.filtering.filter_records", lambda *args, **options: seen.append(options) or FilterSummary()
    )
    given: dict[str, Any] = {
        "keep": 0.3,
        "max_perplexity": 7.0,
        "drop_answerable": True,
        "text": "all",
        "on_empty": "keep",
        "on_error": "skip",
        "batch_size": 3,
        "max_length": 50,
        "max_new_tokens": 4,
        "template_options": {"enable_thinking": False},
        "report": Path("report.jsonl"),
        "restart": True,
    }
    arguments: list[str] = []
    for name, value in given.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
    result = run("data.jsonl", "--model", saved, "-o", tmp_path / "out.jsonl", *arguments, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    settings = seen[0].pop("settings")
    assert settings["model"]["folder"] == str(saved.resolve())
    assert seen == [given]
    names = {one.name for one in typer.main.get_command(app).commands["data"].commands["filter"].params}
    assert names - {"help"} == {*given, "data", "model", "output", "device", "dtype", "trust_remote_code"}


def test_a_changed_model_is_refused(saved: Path, tmp_path: Path) -> None:
    data = write(tmp_path, ["a cat"])
    assert run(data, "--model", saved, "-o", tmp_path / "out.jsonl").exit_code == 0
    (saved / "note.txt").write_text("changed", encoding="utf-8")
    result = run(data, "--model", saved, "-o", tmp_path / "out.jsonl")
    (saved / "note.txt").unlink()
    assert result.exit_code == 2
    assert "has results of a run with other settings (model: " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "none"], "error: `model` must be a folder with a config.json, got none."),
        (["--dtype", "int8"], "error: `dtype` must be 'auto' or the name of a floating-point dtype, got 'int8'."),
        (["--template-options", "[1]"], "error: `--template-options` must be a JSON object, got '[1]'."),
        (["--template-options", "{"], "error: `--template-options` must be a JSON object, got '{': "),
        (["--keep", "2"], "error: `keep` must be a number above 0 and at most 1, got 2.0."),
    ],
)
def test_errors(saved: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(write(tmp_path, ["a cat"]), "--model", saved, "-o", tmp_path / "out.jsonl", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_folder_that_is_no_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}', encoding="utf-8")
    result = run(write(tmp_path, ["a cat"]), "--model", tmp_path, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 2
    assert f"error: `model` {tmp_path} cannot be loaded: " in result.stderr
