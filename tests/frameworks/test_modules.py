"""What holds of the plugins where no framework is installed."""

import ast
import inspect
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from tests.house.import_graph import SOURCE
from tests.serving.models import COMPOSITIONS, build
from vlparts import VisionLanguageModel, frameworks
from vlparts.frameworks import MODULES
from vlparts.training.config import PARTS

PLUGINS = {"swift": "vlparts/frameworks/ms_swift.py"}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_parameter_is_in_one_part(name: str) -> None:
    """The same part as in `vlparts train --train`."""
    with torch.device("meta"):
        model, _ = build(COMPOSITIONS[name])
    modules = dict(model.named_modules())
    assert all(one in modules for names in MODULES.values() for one in names)
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        found = [part for part, names in MODULES.items() if any(parameter.startswith(f"{one}.") for one in names)]
        assert found == [part for part, patterns in PARTS.items() if any(fnmatchcase(parameter, x) for x in patterns)]
        assert len(found) == 1, parameter


def test_only_the_file_of_a_framework_imports_it() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            for package in {name.partition(".")[0] for name in names} & PLUGINS.keys():
                assert str(path.relative_to(SOURCE).as_posix()) == PLUGINS[package]


def test_a_plugin_has_no_relative_imports() -> None:
    """A framework runs the file outside of its package."""
    for plugin in PLUGINS.values():
        tree = ast.parse((SOURCE / plugin).read_text(encoding="utf-8"))
        assert [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level] == []


def test_the_documented_command_prints_the_path_without_the_framework() -> None:
    code = "import vlparts.frameworks as f; print(f.__path__[0] + '/ms_swift.py')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    printed = Path(run.stdout.strip())
    assert printed.is_file()
    assert printed == Path(frameworks.__file__).with_name("ms_swift.py")


def test_the_template_passes_on_every_input_of_images() -> None:
    tree = ast.parse((SOURCE / PLUGINS["swift"]).read_text(encoding="utf-8"))
    (passed,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "IMAGE_INPUTS"
    )
    inputs = inspect.signature(VisionLanguageModel.get_image_features).parameters
    assert set(passed) == {name for name, one in inputs.items() if one.kind is one.POSITIONAL_OR_KEYWORD} - {"self"}
