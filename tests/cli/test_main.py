"""The command line: output, options passed on, and errors."""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from click.testing import Result
from typer.testing import CliRunner

from tests.training.making import TEXT, VISION, example, write_records
from vlparts.backends import BackendStatus
from vlparts.cli import main as command_line
from vlparts.registration import PARTS
from vlparts.run_log import write_log
from vlparts.training.config import TrainConfig

OPTIONS = {
    "capacity",
    "changes",
    "chat_template",
    "check",
    "check_pixels",
    "config",
    "data",
    "dpi",
    "epochs",
    "eval_data",
    "freeze",
    "gradient_accumulation_steps",
    "ignore_columns",
    "learning_rate",
    "loss",
    "max_image_pixels",
    "max_items",
    "max_steps",
    "max_tokens",
    "mix",
    "model",
    "num_proc",
    "on_error",
    "on_outside",
    "optimizer",
    "output",
    "packing",
    "projector",
    "token_reduction",
    "token_ratio",
    "token_count",
    "prompts",
    "recipe",
    "resume",
    "sample_weight_field",
    "save_steps",
    "seed",
    "shuffle_buffer",
    "streaming",
    "template",
    "text",
    "tokenizer",
    "trained",
    "trust_remote_code",
    "vision",
}
OTHERS = {"changes", "check", "config", "recipe", "trained"}  # no settings of that name
FLAGS = {"changes": "set", "ignore_columns": "ignore_column", "prompts": "prompt", "trained": "train"}
SETTINGS: dict[str, Any] = {
    "vision": VISION,
    "text": TEXT,
    "capacity": 300,
    "max_steps": 3,
    "logging_steps": 1,
    "trainer": {"use_cpu": True, "disable_tqdm": True},
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line.console, "width", 500)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command_line.app, [str(one) for one in arguments])


def write_settings(folder: Path, **changes: Any) -> Path:
    """A YAML file (JSON is YAML too) of settings, and the records that it names."""
    if not (folder / "train.jsonl").exists():
        write_records(folder / "train.jsonl", [example(index, folder) for index in range(4)])
    fields = {**SETTINGS, "data": str(folder / "train.jsonl"), "output": str(folder / "output"), **changes}
    path = folder / "settings.yaml"
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}), encoding="utf-8")
    return path


def test_info_names_versions_and_parts() -> None:
    result = run("info")
    assert result.exit_code == 0
    for package in ("torch", "transformers", "accelerate"):
        assert re.search(rf"{package}\W+{re.escape(importlib.metadata.version(package))}\W", result.output), package
    for part in PARTS:
        assert re.search(rf"{part.config.model_type}\W+{part.config.__name__}\W", result.output), part
        assert all(model.__name__ in result.output for model in part.models.values())


def test_info_names_backends_with_the_reasons_of_those_that_are_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = {
        "npu": BackendStatus("npu", False, "ModuleNotFoundError: No module named 'torch_npu' [/extra]"),
        "other": BackendStatus("other", True),
    }
    monkeypatch.setattr("vlparts.backends.backend_status", lambda: statuses)
    output = run("info").output
    assert re.search(r"npu\W+no\W+ModuleNotFoundError: No module named 'torch_npu' \[/extra\]", output)
    assert re.search(r"other\W+yes\W", output)


@pytest.mark.parametrize(("fault", "text", "code"), [("", "passed", 0), ("off by 2", "switched off: off by 2", 1)])
def test_info_checks_the_kernels_of_backends(
    fault: str, text: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlparts.backends.check_backends", lambda: {"npu": {"vlparts::rms_norm": fault}})
    assert "rms_norm" not in run("info").output
    result = run("info", "--self-check")
    assert result.exit_code == code
    assert re.search(rf"npu\s.+vlparts::rms_norm\s.+{text}", result.output)


def test_info_says_that_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlparts.backends.check_backends", dict)
    result = run("info", "--self-check")
    assert result.exit_code == 0
    assert "No active backend has kernels to check." in result.output


def test_the_options_of_train_are_these() -> None:
    command = typer.main.get_command(command_line.app)
    names = {parameter.name for parameter in command.commands["train"].params} - {"help"}
    assert names == OPTIONS
    assert names - OTHERS <= set(TrainConfig.model_fields)


def test_help_lists_every_option() -> None:
    result = CliRunner().invoke(command_line.app, ["train", "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert result.exit_code == 0
    for name in OPTIONS:
        assert f"--{FLAGS.get(name, name).replace('_', '-')}" in result.output
    commands = run("--help").output
    assert all(name in commands for name in ("demo", "train", "info"))


def test_options_come_before_the_file(tmp_path: Path) -> None:
    settings = write_settings(tmp_path)
    result = run("train", "--config", settings, "--max-steps", "1", "--output", tmp_path / "other", "--seed", "5")
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith("1 steps, 0 records skipped.")
    assert (tmp_path / "other" / "model.safetensors").is_file()
    assert not (tmp_path / "output").exists()


def test_every_option_reaches_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "data": Path("a.jsonl"),
        "output": Path("out"),
        "eval_data": Path("b.jsonl"),
        "vision": "navit:small",
        "text": "folder",
        "model": Path("m"),
        "tokenizer": Path("t"),
        "chat_template": Path("c.jinja"),
        "projector": "linear",
        "token_reduction": "merge_similar",
        "token_ratio": 0.25,
        "token_count": 4,
        "train": ["projector", "text"],
        "freeze": ["vision", "model.language_model.layers.0.*"],
        "template": "continuation",
        "prompts": ["What is it?", "Where?"],
        "max_image_pixels": 10**6,
        "dpi": 72.0,
        "capacity": 77,
        "max_items": 6,
        "gradient_accumulation_steps": 5,
        "packing": False,
        "epochs": 2.5,
        "max_steps": 9,
        "max_tokens": 8,
        "optimizer": "muon",
        "learning_rate": 0.5,
        "loss": "openpangu_mix",
        "mix": 0.0,
        "sample_weight_field": "weight",
        "ignore_columns": ["url", "id"],
        "num_proc": 2,
        "check_pixels": True,
        "streaming": True,
        "shuffle_buffer": 11,
        "seed": 3,
        "save_steps": 4,
        "resume": True,
        "on_error": "skip",
        "on_outside": "clamp",
        "trust_remote_code": True,
    }
    assert set(given) == OPTIONS - OTHERS | {"train"}
    arguments: list[str] = []
    for name, value in given.items():
        flag = f"--{FLAGS.get(name, name).replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool):
                arguments.append(flag if one else flag.replace("--", "--no-"))
            else:
                arguments += [flag, str(one)]
    seen: list[TrainConfig] = []
    monkeypatch.setattr("vlparts.training.train.train", lambda config: seen.append(config) or stop())
    passed: list[dict[str, Any]] = []
    with monkeypatch.context() as without_checks:  # some settings exclude each other
        checked = TrainConfig(data="a", output="b")
        without_checks.setattr(
            "vlparts.training.config.load_config", lambda path, changes: passed.append(changes) or checked
        )
        assert run("train", *arguments).exit_code == 2
    assert passed == [given]
    assert run("train", "--data", "a.jsonl", "--output", "out", "--batch-size", "8").exit_code == 2
    assert seen[1].max_items == 8


def stop() -> None:
    raise ValueError("enough")


def test_a_broken_record_ends_with_its_message_and_status_2(tmp_path: Path) -> None:
    settings = write_settings(tmp_path)
    write_records(tmp_path / "train.jsonl", [example(0, tmp_path), {"messages": [], "[bold]": 1}])
    result = run("train", "--config", settings)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'train.jsonl'}, line 2: messages: Tuple should have at least")
    assert "Traceback" not in result.output


def test_messages_are_shown_as_they_are(tmp_path: Path) -> None:
    """Brackets in messages are not rendered as markup."""
    settings = write_settings(tmp_path)
    rows = [example(0, tmp_path), {**example(1, tmp_path), "image": "[/red][bold]none.png"}]
    write_records(tmp_path / "train.jsonl", rows)
    assert "[/red][bold]none.png does not exist" in run("train", "--config", settings).stderr
    assert "[/red][bold]none.png does not exist" in run("train", "--config", settings, "--on-error", "skip").output


def test_skipped_records_are_listed_and_counted(tmp_path: Path) -> None:
    settings = write_settings(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8")
    (tmp_path / "train.jsonl").write_text("{\n" + lines + "[]\n", encoding="utf-8")
    result = run("train", "--config", settings, "--on-error", "skip", "--max-steps", "1")
    assert result.exit_code == 0, result.output
    assert f"skipped: {tmp_path / 'train.jsonl'}, line 1: Not valid JSON" in result.output
    assert f"skipped: {tmp_path / 'train.jsonl'}, line 6: Expected a JSON object, got list" in result.output
    assert "1 steps, 2 records skipped." in result.output


def test_only_the_first_process_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        steps, skipped = 1, ["one"]

    monkeypatch.setattr("vlparts.training.train.train", lambda config: Done())
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        output = run("train", "--data", "a", "--output", "b").output
        assert output.count("skipped: one") == output.count("1 steps") == count


INVALID: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "`data`: Field required; `output`: Field required"),
    "on_error": (["--on-error", "warn"], "`on_error`: Input should be 'raise' or 'skip'"),
    "on_outside": (["--on-outside", "cut"], "`on_outside`: Input should be 'raise', 'clamp' or 'skip'"),
    "optimizer": (["--optimizer", "sgd"], "`optimizer`: Input should be 'adamw' or 'muon'"),
    "misspelt setting": (
        ["--config", "typo.yaml"],
        "`learning_rat`: Extra inputs are not permitted; the nearest known name is `learning_rate`",
    ),
    "freeze": (["--freeze", "all"], "`freeze`: Value error, must be vision, projector, text, or patterns"),
    "capacity": (["--capacity", "0"], "`capacity`: Input should be greater than or equal to 1"),
    "learning rate": (["--learning-rate", "0"], "`learning_rate`: Input should be greater than 0"),
    "epochs": (["--epochs", "0"], "`epochs`: Input should be greater than 0"),
    "missing data": (["--data", "none.jsonl", "--output", "out"], "`data` must be a JSON Lines file, got none.jsonl"),
    "missing settings": (["--config", "none.yaml"], "`config` none.yaml cannot be read: "),
    "settings that are no mapping": (["--config", "list.yaml"], "`config` list.yaml must hold a mapping, got list"),
    "settings that are no YAML": (["--config", "broken.yaml"], "`config` broken.yaml cannot be read: "),
    "settings that are no text": (["--config", "bytes.yaml"], "`config` bytes.yaml cannot be read: "),
    "unknown setting": (["--config", "unknown.yaml"], "`no_such_setting`: Extra inputs are not permitted"),
    "setting without a name": (["--config", "number.yaml"], "`5`: "),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_options_exit_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"list": b"[1]", "broken": b"a: [", "bytes": b"a: \xff\xfe", "number": b"5: 6"}
    for file, content in {**files, "unknown": b"no_such_setting: 1", "typo": b"learning_rat: 1"}.items():
        (tmp_path / f"{file}.yaml").write_bytes(content)
    arguments, message = INVALID[name]
    result = run("train", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stdout == ""


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    result = run("train", "--config", write_settings(tmp_path), "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: `output` must be a folder, or a path where one can be made, got ")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_run_is_drawn_into_its_folder_or_elsewhere(tmp_path: Path) -> None:
    write_log(tmp_path / "run", [{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}])
    for arguments, path in (
        ((), tmp_path / "run" / "run.png"),
        (("--output", tmp_path / "other.svg"), tmp_path / "other.svg"),
    ):
        result = run("show", "run", tmp_path / "run", *arguments)
        assert (result.exit_code, result.stdout) == (0, f"{path}\n")
        assert path.stat().st_size > 1000
    result = run("show", "run", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "error: `folder` must be the output of a training run that has logged a step, got "
    )


def test_the_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"vlparts {importlib.metadata.version('vlparts')}\n"


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: TrainConfig) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("vlparts.training.train.train", broken)
    assert isinstance(run("train", "--data", "a", "--output", "b").exception, ZeroDivisionError)


def test_the_demo_takes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("vlparts.demo.run.run_demo", lambda *args, **kwargs: seen.append((args, kwargs)))
    assert run("demo", "--out", "here", "--minutes", "2", "--seed", "4", "--steps", "7").exit_code == 0
    (arguments, options) = seen[0]
    assert arguments == (Path("here"),)
    assert {key: options[key] for key in ("minutes", "seed", "steps")} == {"minutes": 2.0, "seed": 4, "steps": 7}
    assert run("demo", "--text", "moge:small").exit_code == 0
    assert [options["text"] for _, options in seen] == ["qwen3:tiny", "moge:small"]


def test_a_demo_without_steps_is_refused(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path, "--steps", "0")
    assert result.exit_code == 2
    assert re.search("`steps` must be an integer of at least 1, got 0", result.stderr)


def test_a_demo_of_an_unknown_text_model_is_refused(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path / "out", "--text", "moge:huge")
    assert result.exit_code == 2
    assert re.search(r"`text` must be one of qwen3:tiny, .*, got 'moge:huge'", result.stderr)
    assert not (tmp_path / "out").exists()
