"""Every call of a torch_npu operation in the kernels matches the schemas of all supported versions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.npu.schema_lines import VERSIONS, committed

SOURCE = Path(__file__).parents[2] / "src/vlparts_npu"


def schemas(version: str) -> dict[str, list[torch._C.FunctionSchema]]:
    found: dict[str, list[torch._C.FunctionSchema]] = {}
    for line in committed(version):
        schema = torch._C.parse_schema(f"npu::{line}")
        found.setdefault(schema.name.removeprefix("npu::"), []).append(schema)
    return found


def calls(source: str) -> Iterator[ast.Call]:
    """Calls of attributes named `npu_...`, with or without `.default`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and name_of(node.func):
            yield node


def name_of(attribute: ast.Attribute) -> str:
    if attribute.attr == "default" and isinstance(attribute.value, ast.Attribute):
        attribute = attribute.value
    return attribute.attr if attribute.attr.startswith("npu_") else ""


def error_of(call: ast.Call, known: dict[str, list[torch._C.FunctionSchema]]) -> str:
    """Why a call does not match; empty if it does."""
    assert isinstance(call.func, ast.Attribute)
    name = name_of(call.func)
    given = {keyword.arg for keyword in call.keywords}
    if call.args or None in given:
        return f"{name}: arguments without a name"
    if name not in known:
        return f"{name}: no committed schema"
    errors = []
    for schema in known[name]:
        names = {argument.name for argument in schema.arguments}
        needed = {argument.name for argument in schema.arguments if not argument.has_default_value()}
        errors.append(f"unknown {sorted(given - names)}, missing {sorted(needed - given)}")
        if needed <= given <= names:
            return ""
    return f"{name}: {errors[0]}"


def all_calls() -> list[tuple[str, ast.Call]]:
    return [(path.name, call) for path in sorted(SOURCE.glob("*.py")) for call in calls(path.read_text("utf-8"))]


@pytest.mark.parametrize("version", VERSIONS)
def test_calls_of_the_kernels_match_the_schemas(version: str) -> None:
    known = schemas(version)
    errors = [f"{name}:{call.lineno} {error}" for name, call in all_calls() if (error := error_of(call, known))]
    assert errors == []


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("npu.npu_swiglu(input=x, dim=-1)", ""),
        ("torch.ops.npu.npu_swiglu.default(input=x)", ""),
        ("npu.npu_swiglu(x)", "npu_swiglu: arguments without a name"),
        ("npu.npu_swiglu(**options)", "npu_swiglu: arguments without a name"),
        ("npu.npu_swiglu(input=x, axis=-1)", "npu_swiglu: unknown ['axis'], missing []"),
        ("npu.npu_rms_norm(input=x)", "npu_rms_norm: unknown [], missing ['gamma']"),
        ("npu.npu_unheard_of(input=x)", "npu_unheard_of: no committed schema"),
    ],
)
def test_a_wrong_call_is_found(source: str, error: str) -> None:
    known = schemas(VERSIONS[0])
    assert [error_of(call, known) for call in calls(source)] == [error]
