"""The command `soup`: what it writes and prints, and errors."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.checkpoints.files import read_folder
from tests.checkpoints.soup.making import folder
from tests.checkpoints.soup.test_greedy import models
from vlparts.cli.main import app

# Scores without importing torch: the number is the last 4 bytes of one of the files.
SCRIPT = """
import json, struct, sys
from pathlib import Path
for path in Path(sys.argv[1]).glob("*.safetensors"):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "number" in header:
        start, end = header["number"]["data_offsets"]
        print(abs(struct.unpack("<f", data[8 + size + start : 8 + size + end])[0] - 4))
"""


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["soup", *(str(one) for one in arguments)])


def test_a_mean(tmp_path: Path) -> None:
    paths = models(tmp_path)
    (paths[0] / "optimizer.pt").write_bytes(b"")
    result = run(*paths, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr == f"Mean of 4 folders in {tmp_path / 'out'}.\nNot copied: optimizer.pt.\n"
    assert read_folder(tmp_path / "out")["number"] == 0.5
    result = run(*paths[:2], "--output", tmp_path / "weighted", "--weights", "3, 1")
    assert result.exit_code == 0, result.output
    assert read_folder(tmp_path / "weighted")["number"] == 2.25


def test_a_greedy_soup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models(Path())
    Path("score.py").write_text(SCRIPT, encoding="utf-8")
    command = f"'{sys.executable}' score.py {{folder}}"
    result = run("m0", "m1", "m2", "-o", "out", "--greedy", "--evaluate", command, "--lower-is-better")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        "m0: 3", "m1: 2", "m2: 1", "m2 + m1: 0.5", "m2 + m1 + m0: 0.666667", "Mean of 2 folders in out.",
    ]  # fmt: skip
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert rows == [
        ["m2", "1", "yes"], ["m1", "2", ""], ["m0", "3", ""],
        ["m2 + m1", "0.5", "yes"], ["m2 + m1 + m0", "0.666667", ""],
    ]  # fmt: skip
    written = json.loads(Path("out/soup.json").read_text(encoding="utf-8"))
    assert (written["command"], written["lower_is_better"]) == (command, True)
    assert (written["folders"], written["score"], len(written["trials"])) == (["m2", "m1"], 0.5, 5)
    assert read_folder(Path("out"))["number"] == 4.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--greedy"], "`--greedy` and `--evaluate` must be given together."),
        (["--evaluate", "x {folder}"], "`--greedy` and `--evaluate` must be given together."),
        (["--restart"], "`--lower-is-better` and `--restart` must be given with `--greedy` only."),
        (
            ["--greedy", "--evaluate", "x {folder}", "--weights", "1,1"],
            "`--weights` must be given without `--greedy`.",
        ),
        (["--greedy", "--evaluate", "x"], "`evaluate` must be a command with {folder}, got 'x'."),
        (["--greedy", "--evaluate", "no-such-command {folder}"], "The command `no-such-command "),
        (["--weights", "1;1"], "`--weights` must be numbers with commas between them, got '1;1'."),
        (["--weights", "1"], "`weights` must be 2 finite numbers of at least 0, not all of them 0, got [1.0]."),
    ],
)
def test_errors(tmp_path: Path, arguments: list[str], message: str) -> None:
    paths = [folder(tmp_path / "[a]", 0), folder(tmp_path / "b", 1)]
    result = run(*paths, "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert f"error: {message}" in result.stderr
    assert not (tmp_path / "out").exists()
