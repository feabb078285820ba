"""The table of kernel modules is complete, and only `register` imports torch_npu."""

import ast
import importlib
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


def test_all_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name, function in KERNEL_MODULES.items():
        module = importlib.import_module(f"vlparts_npu.{name}")
        monkeypatch.setattr(module, function, lambda name=name: called.append(name))
    register_kernels()
    assert called == list(KERNEL_MODULES)
