"""A recipe in two processes: one journal, the model of every stage, nothing twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.training.making import weights
from tests.training.recipe_making import fields, write_data
from tests.training.test_recipe_resuming import ROOT, STAGES


def launch(folder: Path) -> str:
    """Run the recipe in two processes; its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "vlparts", "train", "--recipe", folder / "recipe.yaml"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_the_stages_together_and_once(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields(tmp_path), sort_keys=False), encoding="utf-8")
    text = launch(tmp_path)
    assert text.count("Stage 3 of 3: instruction") == 1
    journal = tmp_path / "out" / "recipe.jsonl"
    _, *rows = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    assert [row["stage"] for row in rows] == list(STAGES)
    assert [row["steps"] for row in rows] == [4, 4, 4]
    found = {stage: weights(tmp_path / "out" / stage) for stage in STAGES}
    assert all(tensor.isfinite().all() for stage in found.values() for tensor in stage.values())
    # The second stage trains the projector alone, on the encoder of the first one.
    vision = [name for name in found["projector"] if name.startswith("model.vision_tower.")]
    encoder = {
        name.split("vision_model.")[-1]: one for name, one in found["encoder"].items() if "vision_model." in name
    }
    assert vision
    for name in vision:
        assert torch.equal(found["projector"][name], encoder[name.removeprefix("model.vision_tower.")])
    before = journal.read_bytes()
    assert launch(tmp_path).count("finished before") == 3
    assert journal.read_bytes() == before
