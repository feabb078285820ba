"""Greedy soups: the recipe of the paper, commands that score, and runs that continue after a kill."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints.files import assert_same_bytes, read_folder
from tests.checkpoints.soup.making import folder
from vlparts.checkpoints.soup import average_folders, command_evaluator, greedy_soup
from vlparts.checkpoints.soup.greedy import _add_greedily

ROOT = Path(__file__).parents[3]
VALUES = [1.0, 6.0, 3.0, -8.0]


def models(path: Path, values: list[float] = VALUES) -> list[Path]:
    """Models of one number each."""
    return [folder(path / f"m{index}", 0, number=torch.tensor(value)) for index, value in enumerate(values)]


def number(path: Path) -> float:
    return read_folder(path)["number"].item()


def near(target: float) -> Callable[[Path], float]:
    """Score by the distance from a number; the best is 0."""
    return lambda path: -abs(number(path) - target)


def test_the_recipe_by_hand(tmp_path: Path) -> None:
    """Distances from 4: the singles have 3, 2, 1 and 12."""
    paths = models(tmp_path)
    soup = greedy_soup(paths, tmp_path / "out", near(4))
    names = [str(path) for path in paths]
    assert [(trial.folders, trial.score, trial.kept) for trial in soup.trials] == [
        ((names[2],), -1.0, True),
        ((names[1],), -2.0, False),
        ((names[0],), -3.0, False),
        ((names[3],), -12.0, False),
        ((names[2], names[1]), -0.5, True),
        ((names[2], names[1], names[0]), pytest.approx(-2 / 3), False),
        ((names[2], names[1], names[3]), pytest.approx(-11 / 3), False),
    ]
    assert (soup.folders, soup.score) == ((names[2], names[1]), -0.5)
    assert number(tmp_path / "out") == 4.5
    average_folders([paths[2], paths[1]], tmp_path / "mean")
    assert_same_bytes(read_folder(tmp_path / "out"), read_folder(tmp_path / "mean"))
    written = json.loads((tmp_path / "out" / "soup.json").read_text(encoding="utf-8"))
    assert (written["recipe"], written["folders"], written["score"]) == ("greedy", [names[2], names[1]], -0.5)
    assert [trial["kept"] for trial in written["trials"]] == [trial.kept for trial in soup.trials]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2", "m3", "mean", "out"]


def test_lower_scores_can_be_better(tmp_path: Path) -> None:
    paths = models(tmp_path)
    better = greedy_soup(paths, tmp_path / "high", near(4))
    lower = greedy_soup(paths, tmp_path / "low", lambda path: abs(number(path) - 4), lower_is_better=True)
    assert lower.folders == better.folders
    assert [(one.folders, -one.score, one.kept) for one in lower.trials] == [
        (one.folders, one.score, one.kept) for one in better.trials
    ]


def test_equal_scores_keep_the_order_and_are_added(tmp_path: Path) -> None:
    paths = models(tmp_path)
    soup = greedy_soup(paths, tmp_path / "out", lambda path: 0.5)
    assert soup.folders == tuple(str(path) for path in paths)


def oracle(scores: dict[tuple[int, ...], float], count: int) -> tuple[int, ...]:
    """Recipe 1 as the paper prints it."""
    ingredients: tuple[int, ...] = ()
    for model in sorted(range(count), key=lambda index: scores[(index,)], reverse=True):
        if not ingredients or scores[(*ingredients, model)] >= scores[ingredients]:
            ingredients = (*ingredients, model)
    return ingredients


@given(st.integers(1, 4), st.integers(0, 10**6))
def test_the_recipe_against_the_paper(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    subsets = [one for size in range(1, count + 1) for one in permutations(range(count), size)]
    scores = {one: float(torch.randint(5, (), generator=generator)) for one in subsets}
    soup, score, trials = _add_greedily(count, lambda members: scores[members], False)
    assert soup == oracle(scores, count)
    assert score == scores[soup]
    assert len(trials) == 2 * count - 1


KILLED = """
import os, sys
from pathlib import Path
from tests.checkpoints.soup.test_greedy import near
from vlparts.checkpoints.soup import greedy_soup
left = int(sys.argv[1])
def evaluate(path):
    global left
    if not left:
        os._exit(77)
    left -= 1
    return near(4)(path)
greedy_soup(sys.argv[3:], sys.argv[2], evaluate, settings={"command": "near 4"})
"""


def test_a_killed_run_continues_with_the_scores_that_it_has(tmp_path: Path) -> None:
    """Killed while the first mean is evaluated, whose folder is left."""
    paths, evaluations = models(tmp_path), 4
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(evaluations), tmp_path / "out", *paths],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 77, done.stderr
    assert (tmp_path / "out.work" / "mean").is_dir()
    assert not (tmp_path / "out").exists()
    calls: list[Path] = []
    settings = {"command": "near 4"}
    soup = greedy_soup(paths, tmp_path / "out", lambda path: calls.append(path) or near(4)(path), settings=settings)
    assert len(calls) == 7 - evaluations
    whole = greedy_soup(paths, tmp_path / "whole", near(4), settings=settings)
    assert soup == whole
    assert (tmp_path / "out" / "soup.json").read_bytes() == (tmp_path / "whole" / "soup.json").read_bytes()
    assert not (tmp_path / "out.work").exists()


def interrupt(paths: list[Path], output: Path, **options: Any) -> None:
    """Evaluate two models, then fail."""
    left = [0.1, 0.2]
    with pytest.raises(IndexError):
        greedy_soup(paths, output, lambda path: left.pop(), **options)


def test_scores_of_other_runs_are_not_mixed(tmp_path: Path) -> None:
    paths, output = models(tmp_path), tmp_path / "out"
    interrupt(paths, output, settings={"command": "a"})
    with pytest.raises(ValueError, match=r"`output`: .*out.work.* run with other settings \(command: 'a', now 'b'\)"):
        greedy_soup(paths, output, near(4), settings={"command": "b"})
    with pytest.raises(ValueError, match=r"run with other settings \(folders: "):
        greedy_soup(paths[:3], output, near(4), settings={"command": "a"})
    folder(paths[1], 5)
    with pytest.raises(ValueError, match=r"run with other settings \(folders: "):
        greedy_soup(paths, output, near(4), settings={"command": "a"})
    calls: list[Path] = []
    greedy_soup(paths, output, lambda path: calls.append(path) or 0.0, settings={"command": "b"}, restart=True)
    assert len(calls) == 7


def test_a_work_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="`output`: .*out.work must not exist, or be that of an earlier run"):
        greedy_soup(models(tmp_path), tmp_path / "out", near(4))
    assert (tmp_path / "out.work" / "mine").is_file()


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, True, "1"])
def test_scores_that_are_no_numbers(tmp_path: Path, score: Any) -> None:
    with pytest.raises(ValueError, match=r"`evaluate` must return a finite number, got .* for .*m0"):
        greedy_soup(models(tmp_path), tmp_path / "out", lambda path: score)


def test_models_that_do_not_fit_are_not_evaluated(tmp_path: Path) -> None:
    paths = [*models(tmp_path), folder(tmp_path / "other", 0, {"hidden_size": 5})]
    with pytest.raises(ValueError, match="must hold the same model"):
        greedy_soup(paths, tmp_path / "out", lambda path: 1 / 0)
    assert not (tmp_path / "out.work").exists()


SCRIPT = """
import sys
print("evaluating", sys.argv[1:])
print()
print(sys.argv[2])
"""


def test_commands(tmp_path: Path) -> None:
    """Words are passed on as they are: no shell expands them."""
    script = tmp_path / "a score.py"
    script.write_text(SCRIPT, encoding="utf-8")
    evaluate = command_evaluator(f"'{sys.executable}' '{script}' --at={{folder}}/x;ls -0.25 '$HOME {{}}'")
    assert evaluate(tmp_path) == -0.25
    assert command_evaluator(f"'{sys.executable}' '{script}' {{folder}} 1e-3")(tmp_path) == 0.001


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print(1); sys.exit(3)", r"The command `.*/model` failed with exit code 3; last line: '1'"),
        ("print('0.5 %')", r"The command `.*` must print a number as its last line, got '0.5 %'"),
        ("pass", r"The command `.*` must print a number as its last line, got ''"),
    ],
)  # fmt: skip
def test_commands_that_fail(code: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command_evaluator(f'"{sys.executable}" -c "{code}" {{folder}}')(Path("/model"))


def test_commands_that_are_none() -> None:
    with pytest.raises(ValueError, match="`evaluate` must be a command with {folder}, got 'ls'"):
        command_evaluator("ls")
    with pytest.raises(ValueError, match="`evaluate` must be a command, got .*: No closing quotation"):
        command_evaluator("ls '{folder}")
    with pytest.raises(ValueError, match="The command `no-such-command /model` cannot be run"):
        command_evaluator("no-such-command {folder}")(Path("/model"))
