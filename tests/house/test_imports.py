"""What `import vlparts` costs and touches, seen from fresh processes."""

import json
import os
import subprocess
import sys

import pytest

# Most time of an import as a multiple of that of `import numpy` in the same process, since machines differ.
LIMIT, COORDINATES_LIMIT = 6.0, 3.0
ATTEMPTS = 5
FORBIDDEN_MODULES = {"torch_npu", "torchvision", "matplotlib", "peft", "swift", "typer", "vllm"}
# Time is that of the processor, and the best of several processes counts: the machine may be busy.
YARDSTICK = """
import json, sys, time
start = time.process_time()
import numpy
unit = time.process_time() - start
"""
PROBE = f"""
{YARDSTICK}
import torch
from transformers import PreTrainedModel

before = set(sys.modules)
events = []
sys.addaudithook(lambda event, _: events.append(event) if event.startswith("socket.") else None)
start = time.process_time()
import vlparts
times = (time.process_time() - start) / unit
print(json.dumps({{"times": times, "events": events, "modules": sorted(set(sys.modules) - before)}}))
"""


def probe() -> dict:
    """Import vlparts in a fresh process that may reach the network, and return what happened."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VLPARTS_"))}
    environment = {**kept, "OPENBLAS_NUM_THREADS": "1"}  # whose start would be counted for each core
    command = [sys.executable, "-W", "error::DeprecationWarning:vlparts", "-c", PROBE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def imported() -> dict:
    return probe()


def test_import_loads_no_optional_package(imported: dict) -> None:
    assert "vlparts" in imported["modules"]
    loaded = {name.partition(".")[0] for name in imported["modules"]}
    assert loaded & FORBIDDEN_MODULES == set()


def test_import_opens_no_socket(imported: dict) -> None:
    assert imported["events"] == []


COORDINATES = f"""
{YARDSTICK}
start = time.process_time()
import vlparts.coordinates
times = (time.process_time() - start) / unit
print(json.dumps({{"times": times, "modules": sorted({{name.partition(".")[0] for name in sys.modules}})}}))
"""


def test_coordinates_need_neither_torch_nor_transformers() -> None:
    """And take little time, the best of several processes."""
    times: list[float] = []
    while min(times, default=COORDINATES_LIMIT) >= COORDINATES_LIMIT and len(times) < ATTEMPTS:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # whose start would be counted for each core
        command = [sys.executable, "-c", COORDINATES]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr
        found = json.loads(run.stdout)
        assert {"torch", "transformers", "tokenizers", "PIL"} & set(found["modules"]) == set()
        times.append(found["times"])
    assert min(times) < COORDINATES_LIMIT, f"import vlparts.coordinates took {times} times as long as import numpy"


def test_import_is_fast(imported: dict) -> None:
    times = [imported["times"]]
    while min(times) >= LIMIT and len(times) < ATTEMPTS:
        times.append(probe()["times"])
    assert min(times) < LIMIT, f"import vlparts took {times} times as long as import numpy"
