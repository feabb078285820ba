"""What `import vlparts` costs and touches, seen from fresh processes."""

import json
import os
import subprocess
import sys

import pytest

LIMIT_SECONDS = 0.3
ATTEMPTS = 5
FORBIDDEN_MODULES = {"torch_npu", "torchvision", "matplotlib", "peft", "typer"}
# Time is that of the processor, and the best of several processes counts: the machine may be busy.
PROBE = """
import json, sys, time
import torch
from transformers import PreTrainedModel

before = set(sys.modules)
events = []
sys.addaudithook(lambda event, _: events.append(event) if event.startswith("socket.") else None)
start = time.process_time()
import vlparts
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "events": events, "modules": sorted(set(sys.modules) - before)}))
"""


def probe() -> dict:
    """Import vlparts in a fresh process that may reach the network, and return what happened."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VLPARTS_"))}
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


COORDINATES = """
import json, sys, time
start = time.process_time()
import vlparts.coordinates
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_coordinates_need_neither_torch_nor_transformers() -> None:
    """And take under 0.3 s of the processor, the best of several processes."""
    seconds: list[float] = []
    while min(seconds, default=LIMIT_SECONDS) >= LIMIT_SECONDS and len(seconds) < ATTEMPTS:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # whose start would be counted for each core
        command = [sys.executable, "-c", COORDINATES]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr
        found = json.loads(run.stdout)
        assert {"torch", "transformers", "tokenizers", "PIL"} & set(found["modules"]) == set()
        seconds.append(found["seconds"])
    assert min(seconds) < LIMIT_SECONDS, f"import vlparts.coordinates took {seconds} seconds"


def test_import_is_fast(imported: dict) -> None:
    seconds = [imported["seconds"]]
    while min(seconds) >= LIMIT_SECONDS and len(seconds) < ATTEMPTS:
        seconds.append(probe()["seconds"])
    assert min(seconds) < LIMIT_SECONDS, f"import vlparts took {seconds} seconds"
