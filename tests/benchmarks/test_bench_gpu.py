"""The benchmark of GPUs, tried on the CPU with tiny sizes."""

import gc
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let benchmarks import each other, as they do where one is run as a script."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def bench(scripts: None) -> Iterator[Any]:
    """The benchmark; all objects so far are left out of the garbage collection before each measurement of memory."""
    module = importlib.import_module("bench_gpu")
    gc.freeze()
    yield module
    gc.unfreeze()


def test_every_part_prints_finite_figures_of_ours(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--device", "cpu", "--tiny"])
    tables = read_tables(capsys.readouterr().out)
    assert len(tables) == len(bench.PARTS)
    for header, *rows in tables:
        assert rows
        for setting, ours, *others in rows:
            assert math.isfinite(float(ours)), setting
            assert len(others) == len(header) - 2


@pytest.mark.usefixtures("scripts")
def test_a_rival_that_fails_has_the_reason_in_its_cell() -> None:
    measure = importlib.import_module("gpu_measure")

    def refused() -> None:
        raise ValueError("needs a | b\nand more")

    outcomes = measure.race({"ours": lambda: lambda: None, "theirs": refused}, 1, torch.device("cpu"))
    times, memory = measure.rows_of("x", outcomes, "")
    assert times[2] == memory[2] == "ValueError: needs a / b"
    assert float(times[1]) >= 0


def read_tables(text: str) -> list[list[list[str]]]:
    """The rows of each Markdown table, without the line below its header."""
    tables: list[list[list[str]]] = []
    for line, before in zip(text.splitlines(), ["", *text.splitlines()], strict=False):
        cells = [cell.strip() for cell in line.removeprefix("| ").removesuffix(" |").split(" | ")]
        if line.startswith("|") and not before.startswith("|"):
            tables.append([])
        if line.startswith("|") and not line.startswith("| ---"):
            tables[-1].append(cells)
    return tables
