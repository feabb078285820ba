"""The choice of the fastest form: what is measured, kept, read again, and switched off."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vlparts.cli import main as command_line
from vlparts.kernels.cpu import attention as attention_cpu
from vlparts.kernels.cpu import calibration
from vlparts.kernels.cpu import linear as linear_cpu
from vlparts.kernels.cpu.calibration import calibrations, fastest_form, forget_choices


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and nothing chosen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VLPARTS_CALIBRATE", raising=False)
    monkeypatch.setattr(calibration, "_chosen", {})
    return tmp_path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], None]]:
    """Makes trials that take a number of seconds, on a clock of its own."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def trial(seconds: float) -> Callable[[], None]:
        def run() -> None:
            now[0] += seconds

        return run

    return trial


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((1.0, 0.5), "b"), ((1.0, 0.92), "a"), ((1.0, 0.9), "b"), ((1.0, 2.0), "a"), ((1.0, 0.8, 0.7), "c")],
)
def test_the_fastest_is_chosen_if_it_is_faster_by_a_tenth(
    clock: Callable[[float], Callable[[], None]], seconds: tuple[float, ...], expected: str
) -> None:
    forms = "abc"[: len(seconds)]
    trials = {form: clock(0.001 * one) for form, one in zip(forms, seconds, strict=True)}
    assert fastest_form("a layer, 4 rows", list(forms), lambda: trials) == expected
    (found,) = calibrations()
    assert (found["name"], found["chosen"]) == ("a layer, 4 rows", expected)
    assert list(found["seconds"]) == list(forms)
    assert found["seconds"]["a"] == pytest.approx(0.001)


def test_a_form_that_is_slow_is_not_run_again(clock: Callable[[float], Callable[[], None]]) -> None:
    runs = dict.fromkeys("ab", 0)

    def trial(form: str) -> Callable[[], None]:
        def run() -> None:
            runs[form] += 1
            clock({"a": 0.001, "b": 0.002}[form])()

        return run

    fastest_form("one", ["a", "b"], lambda: {form: trial(form) for form in "ab"})
    assert runs == {"a": calibration.ROUNDS + 1, "b": calibration.MIN_ROUNDS + 1}


@pytest.mark.parametrize("slow_runs", [1, 2, 3, 20])
def test_a_moment_of_other_work_decides_nothing(clock: Callable[[float], Callable[[], None]], slow_runs: int) -> None:
    """The first runs of PyTorch's form take ten times as long as it needs, and that of the other twice as long."""
    runs = 0

    def plain() -> None:
        nonlocal runs
        runs += 1
        clock(0.01 if runs <= slow_runs else 0.001)()

    chosen = fastest_form("one", ["a", "b"], lambda: {"a": plain, "b": clock(0.002)})
    assert chosen == ("b" if slow_runs == 20 else "a")


def never() -> dict[str, Callable[[], None]]:
    raise AssertionError("measured again")


def test_a_measurement_is_kept_for_later_processes(clock: Callable[[float], Callable[[], None]]) -> None:
    trials = {"a": clock(0.002), "b": clock(0.001)}
    assert fastest_form("one", ["a", "b"], lambda: trials) == "b"
    assert fastest_form("one", ["a", "b"], never) == "b"
    forget_choices()
    assert fastest_form("one", ["a", "b"], never) == "b"
    forget_choices()
    assert fastest_form("one", ["a", "c"], lambda: {"a": trials["a"], "c": trials["b"]}) == "c"  # b is gone


def test_the_first_process_decides(cache_folder: Path, clock: Callable[[float], Callable[[], None]]) -> None:
    """Another process writes its measurement while this one measures."""

    def trials() -> dict[str, Callable[[], None]]:
        fastest_form("first", ["a", "b"], lambda: {"a": clock(0.001), "b": clock(0.001)})
        (path,) = cache_folder.rglob("first.json")
        other = {"name": "one", "chosen": "a", "seconds": {"a": 1, "b": 2}}
        path.with_name("one.json").write_text(json.dumps(other), encoding="utf-8")
        return {"a": clock(0.002), "b": clock(0.001)}

    assert fastest_form("one", ["a", "b"], trials) == "a"
    assert [path.suffix for path in cache_folder.rglob("*.*")] == [".json", ".json"]


def test_each_number_of_threads_has_its_own(clock: Callable[[float], Callable[[], None]]) -> None:
    assert fastest_form("one", ["a", "b"], lambda: {"a": clock(0.002), "b": clock(0.001)}) == "b"
    torch.set_num_threads(1)
    assert calibrations() == []
    assert fastest_form("one", ["a", "b"], lambda: {"a": clock(0.001), "b": clock(0.002)}) == "a"
    torch.set_num_threads(2)
    assert fastest_form("one", ["a", "b"], never) == "b"


def test_measuring_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    monkeypatch.setenv("VLPARTS_CALIBRATE", "0")
    assert fastest_form("one", ["a", "b"], never) == "a"
    assert list(cache_folder.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "one", "chosen": "z", "seconds": {"a": 1}}'])
def test_a_damaged_file_is_measured_again_and_replaced(
    cache_folder: Path, clock: Callable[[float], Callable[[], None]], content: str
) -> None:
    trials = {"a": clock(0.002), "b": clock(0.001)}
    fastest_form("one", ["a", "b"], lambda: trials)
    (path,) = cache_folder.rglob("one.json")
    path.write_text(content, encoding="utf-8")
    forget_choices()
    assert calibrations() == []
    assert fastest_form("one", ["a", "b"], lambda: trials) == "b"
    assert [one["chosen"] for one in calibrations()] == ["b"]


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Callable[[float], Callable[[], None]]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fastest_form("one", ["a", "b"], lambda: {"a": clock(0.002), "b": clock(0.001)}) == "b"
    assert fastest_form("one", ["a", "b"], never) == "b"


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_all_forms_of_the_kernels_can_be_measured(
    monkeypatch: pytest.MonkeyPatch, context: Callable[[], torch.no_grad]
) -> None:
    monkeypatch.setattr(linear_cpu, "MANY", (1, 16, 24))
    monkeypatch.setattr(linear_cpu, "FEW", (2, 16, 24))
    monkeypatch.setattr(attention_cpu, "MEASURED_LENGTHS", (64, 256))
    state = torch.get_rng_state()
    with context():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows in (1, 3, 32, 512):
                linear_cpu.form_of(dtype, rows, 2048, 2048)
                linear_cpu.form_of(dtype, rows, 2048, 2048, transposed=True)
            for length in (64, 256):
                query = torch.zeros(1, 2, length, 16, dtype=dtype, requires_grad=torch.is_grad_enabled())
                attention_cpu._form_of(query, query, query)
    assert torch.equal(torch.get_rng_state(), state)
    found = {one["name"]: set(one["seconds"]) for one in calibrations()}
    onednn = {"onednn"} if linear_cpu.has_onednn() else set()
    assert found["float32 layer, 4 rows"] == {"pytorch", "weight_first"} | onednn
    assert found["bfloat16 layer, 1 rows"] == {"pytorch", "weight_first", "float32"}
    assert found["float16 layer, 512 rows, transposed"] == {"pytorch", "float32"}
    if linear_cpu.has_onednn():
        trains = ", training" * (context is torch.enable_grad)
        assert found[f"float32 attention{trains}, 256 tokens, blocks"] == {"fused", "blocks"}


def shown() -> str:
    return CliRunner().invoke(command_line.app, ["info", "--kernels"], env={"COLUMNS": "200"}).output


def test_the_command_shows_what_was_measured(
    clock: Callable[[float], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Nothing measured yet" in shown()
    fastest_form("one", ["a", "b"], lambda: {"a": clock(0.002), "b": clock(0.001)})
    output = shown()
    assert "one" in output
    assert "2.00" in output
    monkeypatch.setenv("VLPARTS_CALIBRATE", "0")
    assert "VLPARTS_CALIBRATE=0" in shown()
