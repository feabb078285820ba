"""NaViTs converted from timm's NaFlexVit compute the same outputs; the cases run in a separate process."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parity.naflexvit_cases import CASES, GRIDS, REFUSED

ROOT = Path(__file__).parents[2]
# timm resamples its tables in float32, whatever their dtype.
IN_FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the outputs of all cases."""
    timm = os.environ.get("VLPARTS_TIMM", "")  # a folder, so that nothing else imports it
    if not (Path(timm, "timm").is_dir() if timm else importlib.util.find_spec("timm")):
        pytest.fail(
            "timm is missing; install it with `pip install --no-deps -c constraints.txt --target FOLDER timm`, and "
            "set the environment variable VLPARTS_TIMM to the folder"
        )
    folder = tmp_path_factory.mktemp("naflexvit")
    command = [sys.executable, "-m", "tests.parity.naflexvit_cases", str(folder)]
    paths = [os.path.abspath(timm)] if timm else []
    path = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    environment = {**os.environ, **({"PYTHONPATH": path} if path else {})}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr
    return folder


def image_of_native_size(output: Tensor) -> Tensor:
    """The part of an output for the image of 4 x 4 patches, for which no table is resampled."""
    index = GRIDS.index((4, 4))
    lengths = [rows * columns for rows, columns in GRIDS]
    return output.split(lengths)[index] if output.shape[0] == sum(lengths) else output[index]


@pytest.mark.parametrize("name", CASES)
def test_equals_naflexvit(results: Path, name: str) -> None:
    outputs = load_file(results / f"{name}.safetensors")
    kinds = {"patches", "prefix"}
    kinds |= {"pooled"} if CASES[name]["global_pool"] else set()
    kinds |= {"logits"} if "num_classes" in CASES[name] else set()
    assert outputs.keys() == {f"{kind}.{side}" for kind in kinds for side in ("timm", "vlparts")}
    for kind in kinds:
        actual, expected = outputs[f"{kind}.vlparts"], outputs[f"{kind}.timm"]
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, **IN_FLOAT32)
        torch.testing.assert_close(image_of_native_size(actual), image_of_native_size(expected))


@pytest.mark.parametrize("option", REFUSED)
def test_refused_options_are_named(results: Path, option: str) -> None:
    messages = json.loads((results / "refused.json").read_text(encoding="utf-8"))
    assert f"`{option}`" in messages[option]


@pytest.mark.parametrize("file", ["noxfile.py", "CONTRIBUTING.md"])
def test_timm_is_not_installed_beside_accelerate(file: str) -> None:
    """The command `accelerate` imports an installed timm, which imports torchvision."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if "install" in line and re.search(r"\btimm\b\W*( #.*)?$", line)]
    assert found
    assert all("--target" in line for line in found)
