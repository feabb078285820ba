"""The commands of the pages on filters and soups run with the files that the pages make, and print what they show."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlparts.cli.main import app

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(python|bash|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["data_filter", "soups"])
def test_commands_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    shown, ran = "", 0
    for kind, block in BLOCK.findall((DOCS / f"{name}.md").read_text(encoding="utf-8")):
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(block, namespace)  # noqa: S102  # as in tests/house/test_docs.py
        elif kind == "text":
            assert _rounded(shown).endswith(_rounded(block))  # after the progress of loading
        else:
            for line in block.splitlines():
                words = shlex.split(line)
                assert words[:3] == ["python", "-m", "vlparts"]
                result = CliRunner().invoke(app, [word.replace("python ", f"{sys.executable} ") for word in words[3:]])
                assert result.exit_code == 0, result.output
                shown, ran = result.stderr, ran + 1
    assert ran


def _rounded(text: str) -> str:
    return re.sub(r"perplexity: [\d.]+", "perplexity", text)
