"""Schemas of torch_npu's operations, one per line, read from its wheels without installing them.

python -m tests.npu.schema_lines torch_npu-2.13.0-*.whl ...     compare with the committed lines
python -m tests.npu.schema_lines --write torch_npu-*.whl ...    write the lines
"""

import re
import sys
import zipfile
from pathlib import Path

FOLDER = Path(__file__).with_name("schemas")
VERSIONS = ("2.11", "2.12", "2.13", "2.14")
# Holds the schemas that torch_npu registers. In the wheel's YAML file arguments named `input` are called `self`.
LIBRARY = "torch_npu/lib/libtorch_npu.so"

# Operations that the kernels call, and the backward operations that torch_npu's derivatives call.
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
    """Return the committed lines of a version, such as "2.13"."""
    return (FOLDER / f"{version}.txt").read_text(encoding="utf-8").splitlines()


def extracted(wheel: Path) -> list[str]:
    """Return the sorted schemas of `NAMES` in a wheel, all overloads included."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(LIBRARY)
    names = "|".join(NAMES).encode()
    found = re.findall(rb"(?<=\0)(?:npu::)?((?:%b)(?:\.\w+)?\([^\0]*\) -> [^\0]+)(?=\0)" % names, content)
    return sorted({line.decode() for line in found})


def version_of(wheel: Path) -> str:
    """Return the major and minor version in a wheel's file name."""
    found = re.match(r"torch_npu-(\d+\.\d+)\.", wheel.name)
    if found is None:
        raise ValueError(f"The name of a torch_npu wheel was expected, got {wheel.name}.")
    return found[1]


def main(arguments: list[str]) -> None:
    """Compare or write the lines of the given wheels."""
    write = "--write" in arguments
    wheels = [Path(argument) for argument in arguments if argument != "--write"]
    found = {version_of(wheel): extracted(wheel) for wheel in wheels}
    missing = sorted(set(VERSIONS) - found.keys())
    if missing:
        raise SystemExit(f"A wheel of each supported version is needed, got none of {', '.join(missing)}.")
    for version, lines in found.items():
        if write:
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / f"{version}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        elif lines != committed(version):
            differing = "\n".join(sorted(set(lines) ^ set(committed(version))))
            raise SystemExit(f"The committed lines of {version} differ from the wheel's:\n{differing}")
        print(f"{version}: {len(lines)} lines")


if __name__ == "__main__":
    main(sys.argv[1:])
