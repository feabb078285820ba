"""NaViTs converted from timm's NaFlexVit compute the same outputs; the cases run in a separate process."""

import importlib.util
import json
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
    if importlib.util.find_spec("timm") is None:
        pytest.fail("timm is missing; install it with `pip install --no-deps -c constraints.txt timm`")
    folder = tmp_path_factory.mktemp("naflexvit")
    command = [sys.executable, "-m", "tests.parity.naflexvit_cases", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
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
