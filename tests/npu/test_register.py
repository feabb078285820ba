"""The table of kernel modules is complete, and only `register` imports torch_npu."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlparts_npu
from vlparts_npu import KERNEL_MODULES, register_kernels

FOLDER = Path(vlparts_npu.__file__).parent


def test_every_module_that_registers_is_in_the_table() -> None:
    found = {}
    for path in FOLDER.glob("*.py"):
        body = ast.parse(path.read_text("utf-8")).body
        if any(isinstance(node, ast.FunctionDef) and node.name == f"register_{path.stem}" for node in body):
            found[path.stem] = f"register_{path.stem}"
    assert found == KERNEL_MODULES


def test_the_modules_import_without_torch_npu() -> None:
    """The package itself imports without torch, so that a missing torch_npu is reported at once."""
    code = "import sys, vlparts_npu; assert not {'torch', 'torch_npu'} & set(sys.modules)\n"
    code += "\n".join(f"import vlparts_npu.{name}" for name in KERNEL_MODULES)
    code += "\nassert 'torch_npu' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("call", ["import vlparts_npu; vlparts_npu.register()", "import vlparts, transformers"])
def test_the_backend_is_active_in_a_fresh_process(call: str, tmp_path: Path) -> None:
    """By a direct call, during which vlparts loads all backends, or by the entry point alone."""
    (tmp_path / "torch_npu.py").touch()
    code = f"{call}\nimport torch\nfrom vlparts.backends import backend_status\n"
    code += "assert backend_status()['npu'].active, backend_status()\n"
    code += "from vlparts_npu.self_check import DISPATCH_KEYS, KERNELS\n"
    code += "has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key\n"
    code += "names = [name for name in KERNELS if name.startswith('vlparts::')]\n"
    code += "assert len(names) == 6, names\n"
    code += "assert all(has_kernel(name, key) for name in names for key in DISPATCH_KEYS)\n"
    path = os.pathsep.join((str(tmp_path), str(FOLDER.parent)))
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr


def test_all_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name, function in KERNEL_MODULES.items():
        module = importlib.import_module(f"vlparts_npu.{name}")
        monkeypatch.setattr(module, function, lambda name=name: called.append(name))
    register_kernels()
    assert called == list(KERNEL_MODULES)
