"""A stub of CANN with host memory as device memory, on which torch_npu runs without an NPU.

torch_npu's schemas, argument checks, shape functions, derivatives and choice of device kernels are real. The device
kernels compute nothing.
"""

import ctypes
import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

HAND_WRITTEN = Path(__file__).with_name("cann.c")
# Libraries that torch_npu links besides ascendcl, opapi and atb; empty, they link ascendcl.
OTHER_LIBRARIES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "runtime")
_OBJECT = re.compile(
    r"acl(Create|Destroy)(Tensor|Scalar|IntArray|BoolArray|FloatArray|TensorList|ScalarList|AclOpExecutor)(?!.*Desc)"
)
_WORKSPACE = "GetWorkspaceSize"


class Cann:
    """The loaded stub.

    Args:
        folder: Folder in which its libraries are built.
    """

    def __init__(self, folder: Path) -> None:
        build(folder)
        # Libraries that are loaded already are used for later requests of their name.
        self.library = ctypes.CDLL(str(folder / "libascendcl.so"), ctypes.RTLD_GLOBAL)
        for name in ("opapi", "atb", *OTHER_LIBRARIES):
            ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL)
        self.library.stub_log.restype = ctypes.c_char_p

    def clear(self) -> None:
        """Clear the log of device kernels."""
        self.library.stub_clear()

    def kernels(self) -> list[str]:
        """Names of the device kernels requested since `clear`, in order."""
        return self.library.stub_log().decode().split()

    def counts(self) -> Counter[str]:
        """Number of requests per device kernel since `clear`."""
        return Counter(self.kernels())


def build(folder: Path) -> None:
    """Write and compile the libraries."""
    names, transformer_names = _requested_names()
    runtime = HAND_WRITTEN.read_text(encoding="utf-8")
    answered = set(re.findall(r"^\S[\w *]*?(\w+)\(", runtime, flags=re.MULTILINE))
    operators = [name for name in names if name.startswith("aclnn")]
    objects = [name for name in names if _OBJECT.match(name)]
    rest = names - answered - set(operators) - set(objects)
    lines = ["#include <stdlib.h>", "void stub_log_kernel(const char *);"]
    lines += [_operator(name) for name in sorted(operators)]
    lines += [_object(name) for name in sorted(objects)]
    lines += ["int InitHugeMemThreadLocal(void *a, int b) { return 0; }"]
    lines += [f"void {name}(void *a, int b) {{ }}" for name in ("UnInitHugeMemThreadLocal", "ReleaseHugeMem")]
    _compile(folder, "ascendcl", runtime + "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(rest)))
    _compile(folder, "opapi", "\n".join(lines), "ascendcl")
    _compile(folder, "atb", "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(transformer_names)))
    for name in OTHER_LIBRARIES:
        _compile(folder, name, "", "ascendcl")


def _operator(name: str) -> str:
    """C code of a function that plans or launches a device kernel; planning, in the calling thread, is logged."""
    log = f'stub_log_kernel("{name.removesuffix(_WORKSPACE)}"); ' if name.endswith(_WORKSPACE) else ""
    return f"int {name}(void) {{ {log}return 0; }}"


def _object(name: str) -> str:
    if "Create" in name:
        return f"void *{name}(void) {{ return malloc(16); }}"
    return f"int {name}(void *p) {{ return 0; }}"


def _requested_names() -> tuple[set[str], set[str]]:
    """Names of functions in torch_npu's libraries: of CANN, and of its transformer library, mangled."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("torch_npu is not installed.", name="torch_npu")
    package = Path(spec.submodule_search_locations[0])
    content = b"\0".join(path.read_bytes() for path in [*package.glob("_C*.so"), *package.glob("lib/*.so")])
    plain = re.findall(rb"(?<=\0)((?:acl|rt[A-Z]|Msprof|Hccl)[A-Za-z0-9_]{3,80})(?=\0)", content)
    transformer = re.findall(rb"(?<=\0)(_ZN3atb[A-Za-z0-9_]+)(?=\0)", content)
    return {name.decode() for name in plain}, {name.decode() for name in transformer}


def _compile(folder: Path, name: str, source: str, needs: str | None = None) -> None:
    file = folder / f"{name}.c"
    file.write_text(source, encoding="utf-8")
    command = ["gcc", "-w", "-shared", "-fPIC", "-O1", "-o", str(folder / f"lib{name}.so"), str(file)]
    command.append(f"-Wl,-soname,lib{name}.so")
    if needs is not None:
        command += ["-Wl,--no-as-needed", f"-L{folder}", f"-l{needs}"]
    subprocess.run(command, check=True)
