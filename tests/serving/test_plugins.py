"""What holds of the plugins where no engine is installed."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.house.import_graph import SOURCE, files
from vlparts.parts.configuration_moge import MoGEConfig
from vlparts.parts.modeling_moge import MoGEBlock
from vlparts.parts.moe_options import SCORINGS

ROOT = Path(__file__).parents[2]


def test_entry_points_exist() -> None:
    """Read from the text: what they name can be imported only where the engine is installed."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    points = groups["vllm.general_plugins"]
    assert points
    for target in points.values():
        module, function = target.split(":")
        tree = ast.parse(files()[module].read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_only_the_files_of_an_engine_import_it() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            if any(name.partition(".")[0] == "vllm" for name in names):
                assert path.relative_to(SOURCE).match("vlparts/serving/vllm_*.py"), path


def test_import_of_the_package_imports_no_engine() -> None:
    code = "import sys, vlparts.serving, vlparts.serving.request_options; print('vllm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert run.stdout.strip() == "False"


class CalledFunctions(torch.overrides.TorchFunctionMode):
    """Collects the names of the functions of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("router_scale", [True, False])
def test_the_router_cannot_be_taken_for_a_plain_choice(scoring: str, groups: int, router_scale: bool) -> None:
    """vLLM takes a router with a softmax or sigmoid before a `topk` for the K best of all experts and replaces it."""
    changes = {"num_expert_groups": groups, "scoring": scoring, "router_scale": router_scale}
    config = MoGEConfig.from_preset("tiny", num_experts=8, num_experts_per_tok=4, **changes)
    block = MoGEBlock(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    with CalledFunctions() as called, torch.no_grad():
        block(torch.randn(1, 5, config.hidden_size))
    assert "linear" in called.names
    assert "topk" not in called.names
