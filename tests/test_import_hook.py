"""Importing vlparts registers the parts when transformers is imported, and names a broken torch_npu."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlparts

# What torch_npu raises without CANN, two modules deep.
FAULT = "libhccl.so: cannot open shared object file: No such file or directory"


def install(folder: Path, name: str, files: dict[str, str]) -> None:
    """Write a package that torch loads by itself, as it does torch_npu."""
    points = folder / f"{name}-2.13.0.dist-info" / "entry_points.txt"
    points.parent.mkdir()
    points.write_text(f"[torch.backends]\n{name} = {name}:_autoload\n", encoding="utf-8")
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.13.0\n"
    points.with_name("METADATA").write_text(metadata, encoding="utf-8")
    (folder / name).mkdir()
    for file, text in files.items():
        (folder / name / file).write_text(text, encoding="utf-8")


def import_vlparts(folder: Path, autoload: str) -> str:
    """The last line of the traceback of the first use of vlparts with the packages of a folder."""
    source = Path(vlparts.__file__).parents[1]
    path = os.pathsep.join((str(folder), str(source)))
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    command = [sys.executable, "-c", "import vlparts; vlparts.compose"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 1
    return run.stderr.splitlines()[-1]


@pytest.mark.parametrize("autoload", ["0", "1"], ids=["transformers imports it", "torch imports it"])
def test_a_broken_torch_npu_is_named(tmp_path: Path, autoload: str) -> None:
    broken = {"__init__.py": "import torch_npu.library", "library.py": f"raise ImportError({FAULT!r})"}
    install(tmp_path, "torch_npu", broken)
    assert import_vlparts(tmp_path, autoload) == (
        f"ImportError: torch_npu is installed but cannot be imported (ImportError: {FAULT}), which torch and "
        "transformers try. Check that CANN is installed and its set_env.sh sourced, or uninstall torch-npu."
    )


def test_the_fault_of_another_library_is_left_as_it_is(tmp_path: Path) -> None:
    install(tmp_path, "transformers", {"__init__.py": f"raise ImportError({FAULT!r})"})
    assert import_vlparts(tmp_path, "0") == f"ImportError: {FAULT}"


def test_a_function_of_torch_npu_in_the_traceback_is_not_at_fault(tmp_path: Path) -> None:
    install(tmp_path, "torch_npu", {"__init__.py": "def call(function): function()"})
    install(tmp_path, "transformers", {"__init__.py": f"def fail(): raise ImportError({FAULT!r})"})
    calling = "import torch_npu, transformers\ntorch_npu.call(transformers.fail)\n"
    (tmp_path / "transformers" / "modeling_utils.py").write_text(calling, encoding="utf-8")
    assert import_vlparts(tmp_path, "0") == f"ImportError: {FAULT}"


FOUND = "from transformers import AutoConfig; print(type(AutoConfig.for_model('vlparts_navit')).__module__)"


@pytest.mark.parametrize(
    "before",
    [
        "import vlparts",
        "import vlparts.coordinates",
        "import transformers; import vlparts",
        "import importlib.util, vlparts; importlib.util.find_spec('transformers')",
        "import vlparts; from transformers import AutoModel",
        "import vlparts.parts.modeling_navit",
        "import vlparts.parts.configuration_vlm",
        "import vlparts.moe.experts_sorted",
        "import vlparts.kernels.cpu.linear",
        "import vlparts.losses.weights",
        "import vlparts.registration",
        "from vlparts import compose",
        "import vlparts_npu.attention",
    ],
)
def test_parts_are_registered_whatever_is_imported_first(before: str) -> None:
    command = [sys.executable, "-c", f"{before}; {FOUND}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.stdout.strip() == "vlparts.parts.configuration_navit", run.stderr


def test_the_hook_leaves_transformers_as_it_would_be() -> None:
    show = (
        "import sys, transformers as t; print(t.__spec__.loader.__class__, t.__loader__.__class__, len(sys.meta_path))"
    )
    shown = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True).stdout
        for code in (f"import vlparts; {show}", show)
    ]
    assert shown[0] == shown[1]


def test_a_missing_transformers_is_not_found_as_ever(tmp_path: Path) -> None:
    code = "import sys, vlparts; sys.path[:] = []; import transformers"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert run.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'transformers'"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'vlparts' has no attribute 'no_such_name'"):
        vlparts.no_such_name  # noqa: B018
    assert set(vlparts.__all__) <= set(dir(vlparts))
