"""Recipes that are cut off in any stage go on as if they had not been."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.training.making import weights, write_records
from tests.training.recipe_making import small_recipe, turn
from vlparts.training.recipe import RecipeResult, run_recipe

ROOT = Path(__file__).parents[2]
STAGES = ("encoder", "projector", "instruction")


class Cut(TrainerCallback):
    """Ends a stage after a step, without cleanup."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step:
            self.end()

    def end(self) -> None:
        raise InterruptedError


class Kill(Cut):
    """Ends the whole process at once."""

    def end(self) -> None:
        os._exit(77)


def logs(result: RecipeResult) -> list[Any]:
    return [
        [{name: line[name] for name in line if not name.startswith("speed/")} for line in stage.log if "loss" in line]
        for stage in result.stages
    ]


def assert_same(folder: Path, resumed: RecipeResult, whole: RecipeResult, output: str) -> None:
    assert logs(resumed) == logs(whole)
    for stage in STAGES:
        ours, theirs = weights(folder / output / stage), weights(folder / "whole" / stage)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), stage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RecipeResult]:
    """A run without interruption, and its folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_recipe(small_recipe(folder, "whole"))


# Before the first checkpoint, between two, and after the last one.
@pytest.mark.parametrize(("stage", "step"), [("encoder", 3), ("projector", 1), ("instruction", 3)])
def test_a_recipe_that_was_cut_off_goes_on_to_the_bit(whole: tuple[Path, RecipeResult], stage: str, step: int) -> None:
    folder, expected = whole
    with pytest.raises(InterruptedError):
        run_recipe(small_recipe(folder, stage), callbacks=[Cut(stage, step)])
    done = STAGES[: STAGES.index(stage)]
    before = {name: (folder / stage / name / "model.safetensors").stat().st_mtime_ns for name in done}
    seen: list[tuple[str, bool]] = []
    resumed = run_recipe(small_recipe(folder, stage), on_stage=lambda *one: seen.append(one))
    assert seen == [(name, name in done) for name in STAGES]
    assert before == {name: (folder / stage / name / "model.safetensors").stat().st_mtime_ns for name in done}
    assert_same(folder, resumed, expected, stage)


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on_to_the_bit(whole: tuple[Path, RecipeResult]) -> None:
    """Each time in another stage, and each time a new process builds everything anew."""
    folder, expected = whole
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from tests.training.recipe_making import small_recipe\n"
        "from tests.training.test_recipe_resuming import Kill\n"
        "from vlparts.training.recipe import run_recipe\n"
        "run_recipe(small_recipe(Path(sys.argv[1]), 'killed'), callbacks=[Kill(sys.argv[2], 3)])"
    )
    for stage in ("encoder", "instruction"):
        done = subprocess.run(
            [sys.executable, "-c", script, folder, stage],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 77, done.stderr
        assert not (folder / "killed" / stage / "model.safetensors").exists()
    assert_same(folder, run_recipe(small_recipe(folder, "killed")), expected, "killed")


def test_a_finished_recipe_is_not_trained_again(whole: tuple[Path, RecipeResult]) -> None:
    folder, expected = whole
    again = run_recipe(small_recipe(folder, "whole"), callbacks=[Cut("instruction", 1)])
    assert again == expected
    assert again.folder == folder / "whole" / "instruction"


@pytest.mark.parametrize("changed", ["projector.learning_rate", "defaults.seed"])
def test_a_changed_recipe_is_refused_by_the_name_of_the_field(whole: tuple[Path, RecipeResult], changed: str) -> None:
    folder, _ = whole
    stage, field = changed.split(".")
    named = rf"{stage}\.{field}: " if stage in STAGES else rf"encoder\.{field}: .*instruction\.{field}: "
    with pytest.raises(ValueError, match=rf"`output`: .*recipe\.jsonl has results of a run with other .*{named}"):
        run_recipe(small_recipe(folder, "whole", **{changed: 7}))


def test_changed_records_are_refused_by_their_file(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    with pytest.raises(InterruptedError):
        run_recipe(recipe, callbacks=[Cut("encoder", 1)])
    write_records(tmp_path / "texts.jsonl", [{"messages": [turn("user", "a"), turn("assistant", "b")]}])
    with pytest.raises(ValueError, match=r"has results of a run with other settings \(instruction: .*texts\.jsonl: "):
        run_recipe(recipe)
