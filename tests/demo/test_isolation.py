"""The environment that hides one package."""

import json
import site
from pathlib import Path

import pytest

from vlparts.demo.isolation import environment_without, run_without

REPORT = """
import importlib.util, json, sys
names = ["vlparts", "vlparts_npu", "torch", "transformers", "safetensors", "numpy", "PIL", "packaging"]
print(json.dumps({name: importlib.util.find_spec(name) is not None for name in names}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_without(tmp_path_factory.mktemp("bare") / "environment")


def test_ours_are_hidden_and_the_others_are_there(python: Path, tmp_path: Path) -> None:
    found = json.loads(run_without(python, REPORT, modules_cache=tmp_path))
    assert found == {name: name not in ("vlparts", "vlparts_npu") for name in found}


def test_the_others_can_be_imported(python: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    script = (
        "import torch, transformers; print(torch.ones(2).sum().item(), transformers.__version__, torch.__version__)"
    )
    answer = run_without(python, script, modules_cache=tmp_path)
    assert answer.split() == ["2.0", transformers.__version__, torch.__version__]


def test_paths_of_this_process_do_not_lead_there(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither PYTHONPATH, nor the working directory, nor the folder of the script."""
    source = Path(__file__).parents[2] / "src"
    monkeypatch.setenv("PYTHONPATH", str(source))
    monkeypatch.chdir(source)
    (tmp_path / "vlparts.py").write_text("", encoding="utf-8")
    (tmp_path / "script.py").write_text(REPORT, encoding="utf-8")
    for script in (REPORT, tmp_path / "script.py"):
        assert '"vlparts": false' in run_without(python, script, modules_cache=tmp_path / "code")


def test_arguments_cache_and_network(python: Path, tmp_path: Path) -> None:
    script = "import os, sys; print(sys.argv[1:], os.environ['HF_MODULES_CACHE'], os.environ['HF_HUB_OFFLINE'])"
    answer = run_without(python, script, "a b", tmp_path, modules_cache=tmp_path / "code")
    assert answer == f"{['a b', str(tmp_path)]} {tmp_path / 'code'} 1\n"


def test_a_failure_is_an_error_with_what_it_wrote(python: Path, tmp_path: Path) -> None:
    script = "import sys; print('before'); print('what went wrong', file=sys.stderr); sys.exit(3)"
    with pytest.raises(RuntimeError, match=r"(?s)exited with status 3.*what went wrong"):
        run_without(python, script, modules_cache=tmp_path)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_without(python, "1 / 0", modules_cache=tmp_path)


def test_a_run_that_takes_too_long_is_an_error(python: Path, tmp_path: Path) -> None:
    script = "import sys, time; print('waiting', file=sys.stderr, flush=True); time.sleep(60)"
    with pytest.raises(RuntimeError, match=r"(?s)did not finish within 2 seconds.*waiting"):
        run_without(python, script, modules_cache=tmp_path, timeout=2)


def test_another_package_can_be_hidden(tmp_path: Path) -> None:
    python = environment_without(tmp_path / "environment", "safetensors")
    script = "import importlib.util as u; print(u.find_spec('safetensors'), u.find_spec('numpy') is not None)"
    assert run_without(python, script, modules_cache=tmp_path) == "None True\n"


def test_editable_installations_are_hidden_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a path file that points to the source."""
    packages, source = tmp_path / "packages", tmp_path / "source"
    for folder in (packages / "vlparts-0.1.0.dist-info", packages / "other", source / "vlparts"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("", encoding="utf-8")
    for name in ("_vlparts.pth", "__editable__.vlparts-0.1.0.pth"):
        (packages / name).write_text(str(source), encoding="utf-8")
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(packages)])
    monkeypatch.syspath_prepend(packages)
    python = environment_without(tmp_path / "environment")
    script = "import importlib.util as u; print(u.find_spec('vlparts'), u.find_spec('other') is not None)"
    assert run_without(python, script, modules_cache=tmp_path) == "None True\n"
