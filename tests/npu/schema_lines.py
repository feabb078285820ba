"""Schema lines of torch_npu's operations, read from its wheels without installing them.

python -m tests.npu.schema_lines torch_npu-2.13.0-*.whl ...     compare with the committed lines
python -m tests.npu.schema_lines --write torch_npu-*.whl ...    write them
"""

import re
import sys
import zipfile
from pathlib import Path

FOLDER = Path(__file__).with_name("schemas")
VERSIONS = ("2.11", "2.12", "2.13", "2.14")
# The lines that its library registers. The YAML file in the wheel says `self` where the library says `input`.
LIBRARY = "torch_npu/lib/libtorch_npu.so"

# Operations that the kernels call, and the backward operations that torch_npu's own formulas call.
NAMES = (
    "npu_fused_infer_attention_score",
    "npu_fusion_attention",
    "npu_fusion_attention_grad",
    "npu_gelu",
    "npu_gelu_backward",
    "npu_grouped_matmul",
    "npu_moe_token_permute",
    "npu_moe_token_permute_grad",
    "npu_moe_token_unpermute",
    "npu_moe_token_unpermute_grad",
    "npu_rms_norm",
    "npu_rms_norm_backward",
    "npu_rotary_mul",
    "npu_rotary_mul_backward",
    "npu_swiglu",
    "npu_swiglu_backward",
)


def committed(version: str) -> list[str]:
    """The committed lines of a version, such as "2.13"."""
    return (FOLDER / f"{version}.txt").read_text(encoding="utf-8").splitlines()


def extracted(wheel: Path) -> list[str]:
    """The lines of `NAMES` in a wheel, sorted; every overload."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(LIBRARY)
    names = "|".join(NAMES).encode()
    found = re.findall(rb"(?<=\0)(?:npu::)?((?:%b)(?:\.\w+)?\([^\0]*\) -> [^\0]+)(?=\0)" % names, content)
    return sorted({line.decode() for line in found})


def version_of(wheel: Path) -> str:
    """Major and minor version in a wheel's file name."""
    found = re.match(r"torch_npu-(\d+\.\d+)\.", wheel.name)
    if found is None:
        raise ValueError(f"{wheel.name} is not the name of a wheel of torch_npu")
    return found[1]


def main(arguments: list[str]) -> None:
    """Compare or write the lines of the wheels given."""
    write = "--write" in arguments
    wheels = [Path(argument) for argument in arguments if argument != "--write"]
    found = {version_of(wheel): extracted(wheel) for wheel in wheels}
    missing = sorted(set(VERSIONS) - found.keys())
    if missing:
        raise SystemExit(f"no wheel of {', '.join(missing)} given")
    for version, lines in found.items():
        if write:
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / f"{version}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        elif lines != committed(version):
            differing = "\n".join(sorted(set(lines) ^ set(committed(version))))
            raise SystemExit(f"the committed lines of {version} differ from the wheel's:\n{differing}")
        print(f"{version}: {len(lines)} lines")


if __name__ == "__main__":
    main(sys.argv[1:])
