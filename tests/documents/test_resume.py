"""Interrupted runs: killed at any byte of the journal, between files, and at any time; locks, and other settings."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.documents.made import pdf
from tests.documents.stub import StubModel, StubProcessor
from vlparts.cli.main import app
from vlparts.documents import RunSummary, journal, recognize_documents, writing
from vlparts.documents.journal import Journal

JOURNAL = ".vlparts_ocr.jsonl"
COMMAND = """
import sys, time
from pathlib import Path
from tests.documents.stub import StubModel, StubProcessor
from vlparts.documents import recognize_documents

recognize_documents([Path(sys.argv[1])], sys.argv[2], StubModel(True, lambda turn: time.sleep(0.02)), StubProcessor())
"""


class Killed(BaseException):
    """Ends a run at once, as a kill does: nothing catches it."""


def run(inputs: Path, output: Path, model: StubModel | None = None, **options: Any) -> RunSummary:
    return recognize_documents([inputs], output, model or StubModel(), StubProcessor(), **options)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder; the lock is none of the results."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for index, color in enumerate(("red", "lime")):
        Image.new("RGB", (40 + index, 30), color).save(folder / f"{index}.png")
    pdf(folder / "report.pdf", 3, size=(36, 24))
    return folder


def test_a_journal_cut_at_every_byte(inputs: Path, tmp_path: Path) -> None:
    paths = [inputs / "0.png", inputs / "1.png"]
    rows = [{"document": str(index), "page": 1, "answer": "ü\n" * index} for index in (0, 1)]

    def enter(folder: Path) -> list[bool]:
        """Which rows were there; the others are entered."""
        opened = Journal(folder, paths, {"prompt": "ocr"})
        done = [1 in opened.rows[str(index)] for index in (0, 1)]
        opened.add(row for row, known in zip(rows, done, strict=True) if not known)
        opened.close()
        return done

    enter(tmp_path / "whole")
    data = (tmp_path / "whole" / JOURNAL).read_bytes()
    assert data.count(b"\n") == 5
    folder = tmp_path / "out"
    folder.mkdir()
    for cut in range(len(data) + 1):
        (folder / JOURNAL).write_bytes(data[:cut])
        lines = data[:cut].count(b"\n")
        assert enter(folder) == [lines >= 4, lines >= 5]
        assert (folder / JOURNAL).read_bytes() == data


def test_runs_that_continue_a_cut_journal(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "whole", batch_size=2)
    expected = contents(tmp_path / "whole")
    data, output = expected[JOURNAL], tmp_path / "out"
    for cut in range(0, len(data), len(data) // 9):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        (output / JOURNAL).write_bytes(data[:cut])
        complete = sum(b'"answer"' in line for line in data[: data[:cut].rfind(b"\n") + 1].splitlines())
        summary = run(inputs, output, batch_size=2)
        assert (summary.done, summary.skipped) == (5 - complete, complete)
        assert contents(output) == expected


def test_killed_at_every_write(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends amid each of its writes, which leaves half of a file or line."""
    left = [0]

    def write(path: Path, data: bytes) -> None:
        left[0] -= 1
        path.write_bytes(data if left[0] else data[: len(data) // 2])
        if not left[0]:
            raise Killed

    def write_text(path: Path, text: str) -> None:
        part = path.with_name(path.name + ".part")
        write(part, text.encode())
        os.replace(part, path)

    def append(self: Journal, rows: Any) -> None:
        data = b"".join(map(journal._line, rows))
        left[0] -= 1
        self._file.write(data if left[0] else data[: len(data) // 2])
        self._file.flush()
        if not left[0]:
            raise Killed

    def save_layout(self: writing.OutputFolder, name: str, number: int | None, *arguments: Any) -> None:
        write(self.folder / f"{name}_layout_{number}.png", b"layout")

    def save_image(self: Image.Image, path: Path) -> None:
        write(path, self.tobytes())

    monkeypatch.setattr(writing, "_write", write_text)
    monkeypatch.setattr(Journal, "_append", append)
    monkeypatch.setattr(writing.OutputFolder, "_save_layout", save_layout)
    monkeypatch.setattr(Image.Image, "save", save_image)
    run(inputs, tmp_path / "whole", StubModel(marks=True))
    writes = -left[0]
    assert writes == 1 + 5 * 3 + 3 * 2  # documents; figure, layout and line of each page; two files of each document
    for turn in range(1, writes + 1):
        left[0] = turn
        with pytest.raises(Killed):
            run(inputs, tmp_path / str(turn), StubModel(marks=True))
        run(inputs, tmp_path / str(turn), StubModel(marks=True))
        assert contents(tmp_path / str(turn)) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_processes_killed_at_random_times(inputs: Path, tmp_path: Path) -> None:
    pdf(inputs / "report.pdf", 30, size=(36, 24))

    def start(output: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        arguments = [sys.executable, "-c", COMMAND, str(inputs), str(tmp_path / output)]
        return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE)

    def size() -> int:
        path = tmp_path / "out" / JOURNAL
        return path.stat().st_size if path.exists() else 0

    assert start("whole").wait() == 0
    chance = random.Random(0)
    kills, before = 0, 0
    while True:
        process = start("out")
        while process.poll() is None and size() == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 3.0))
        process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        kills, before = kills + 1, size()
    assert kills
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_runs_at_once_are_refused(inputs: Path, tmp_path: Path) -> None:
    def second(turn: int) -> None:
        with pytest.raises(ValueError, match=r"`output` .*out is in use by another run\."):
            run(inputs, tmp_path / "out")
        seen.append(turn)

    seen: list[int] = []
    run(inputs, tmp_path / "out", StubModel(before=second))
    assert seen == [1, 2, 3, 4, 5]
    assert run(inputs, tmp_path / "out").skipped == 5


def test_settings_bind_once_a_page_is_done(inputs: Path, tmp_path: Path) -> None:
    def fail(turn: int) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        run(inputs, tmp_path / "out", StubModel(before=fail), prompt="ocr")
    run(inputs, tmp_path / "out", prompt="free", pages=[1], settings={"model": "a"}, max_new_tokens=5)
    for options, difference in (
        ({"prompt": "markdown"}, r"prompt '<image>\\nFree OCR\.', not '<image>\\n<\|grounding\|>Convert"),
        ({"settings": {"model": "b"}}, "model 'a', not 'b'"),
        ({"max_new_tokens": 6}, "generation {'max_new_tokens': 5}, not {'max_new_tokens': 6}"),
        ({"image_options": {"mode": "tiny"}}, "image_options {}, not {'mode': 'tiny'}"),
        ({"dpi": 72.0}, "dpi 144, not 72.0"),
    ):
        given = {"prompt": "free", "settings": {"model": "a"}, "max_new_tokens": 5, **options}
        with pytest.raises(ValueError, match=f"has results with other settings: {difference}.* Choose another folder"):
            run(inputs, tmp_path / "out", **given)
    again = run(inputs, tmp_path / "out", prompt="free", settings={"model": "a"}, max_new_tokens=5, batch_size=3)
    assert (again.done, again.skipped) == (2, 3)


def test_pages_of_later_runs_are_added(inputs: Path, tmp_path: Path) -> None:
    for numbers in ([3], [1], [2]):
        run(inputs / "report.pdf", tmp_path / "out", pages=numbers)
    run(inputs / "report.pdf", tmp_path / "whole")
    files = [contents(tmp_path / name) for name in ("out", "whole")]
    assert files[0]["report.md"] == files[1]["report.md"]
    assert files[0]["report.json"] == files[1]["report.json"]


def test_a_document_that_changed_is_done_again(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "out")
    Image.new("RGB", (99, 30)).save(inputs / "1.png")
    summary = run(inputs, tmp_path / "out")
    assert (summary.done, summary.skipped) == (1, 4)
    assert "99" in (tmp_path / "out" / "1.md").read_text()


def test_a_damaged_journal_is_named(inputs: Path, tmp_path: Path) -> None:
    run(inputs, tmp_path / "out")
    path = tmp_path / "out" / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"no JSON\n", b'{"page": 1}\n', b"[]\n"):
        path.write_bytes(b"".join([*lines[:3], damaged, *lines[4:]]))
        with pytest.raises(ValueError, match=r"damaged journal: .*\.vlparts_ocr\.jsonl, line 4\."):
            run(inputs, tmp_path / "out")


def test_the_command_after_ctrl_c_and_without_space(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure: list[BaseException] = [KeyboardInterrupt(), OSError(28, "No space left on device")]

    def fail(turn: int) -> None:
        if turn == 3 and failure:
            raise failure.pop(0)

    monkeypatch.setattr(
        "vlparts.documents.load_ocr_model", lambda *given, **options: (StubModel(before=fail), StubProcessor())
    )
    arguments = ["ocr", str(inputs), "--model", str(tmp_path), "--output", str(tmp_path / "out")]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 130
    assert first.output == "interrupted: 2 pages are done; the same command continues.\n"
    second = CliRunner().invoke(app, arguments)
    assert second.exit_code == 2
    assert second.output == "error: [Errno 28] No space left on device\n"
    third = CliRunner().invoke(app, arguments)
    assert third.exit_code == 0
    assert third.output.startswith("1 page of 3 documents recognized in ")
    assert third.output.endswith(f"pages per minute), 4 done before. Results are in {tmp_path / 'out'}.\n")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["num_pages"] == 3


def test_progress_without_a_terminal_is_a_line_now_and_then(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlparts.documents.load_ocr_model", lambda *given, **options: (StubModel(), StubProcessor()))
    arguments = ["ocr", str(inputs), "--model", str(tmp_path), "--output"]
    silent = CliRunner().invoke(app, [*arguments, str(tmp_path / "silent")])
    assert len(silent.output.splitlines()) == 1
    monkeypatch.setattr("vlparts.cli.ocr.LOG_SECONDS", -1.0)
    *lines, last = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")]).output.splitlines()
    assert lines[0] == f"1 of 5 pages, {inputs / '0.png'}"
    assert lines[4] == f"5 of 5 pages, {inputs / 'report.pdf'}, page 3"
    assert last.startswith("5 pages of 3 documents recognized in ")
