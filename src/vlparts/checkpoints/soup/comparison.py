"""Whether folders hold the same model with other values of its weights."""

import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .._folder import CONFIG, read_json
from .._safetensors import StoredTensors, TensorBytes, list_tensors
from .._weights import FLOATING

__all__ = ["MAY_DIFFER", "PIECE", "check_folders"]

MAY_DIFFER = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "*drop*",
    "initializer_range",
    "router_aux_loss_coef",
)
"""Patterns of the fields of config.json that may differ, at any depth: names, versions and options of training."""
PIECE = 2**22
"""Bytes of a tensor that are read at a time."""
VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
SHOWN = 5  # differences of one kind that a message names


def check_folders(folders: Sequence[str | os.PathLike[str]]) -> list[StoredTensors]:
    """Return the tensors of folders that hold the same model, without their data.

    The folders must have tensors of the same names, shapes and dtypes, equal tensors where they are not of a
    floating-point dtype, a config.json with the same fields except those of `MAY_DIFFER`, and the same vocabulary.

    Args:
        folders: Local folders with a config.json and safetensors.

    Raises:
        ValueError: If there is no folder, if one is no such folder or has quantized weights, or if folders differ;
            names the differences.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("`folders` must have at least one folder, got none.")
    stored = [_list(path) for path in paths]
    configs = [dict(_fields(read_json(path / CONFIG, "folders"))) for path in paths]
    for other, config in zip(stored[1:], configs[1:], strict=True):
        problems = [
            *_config_differences(configs[0], config),
            *_tensor_differences(stored[0], other),
            *_vocabulary_differences(paths[0], other.folder),
        ]
        if problems:
            listed = "; ".join(problems)
            raise ValueError(
                f"`folders` must hold the same model, but {other.folder} differs from {paths[0]}: {listed}."
            )
    for other in stored[1:]:
        unequal = [name for name in _integer_names(stored[0]) if not _is_equal(stored[0], other, name)]
        if unequal:
            raise ValueError(
                f"`folders` must have equal tensors where they are not of a floating-point dtype, but {other.folder} "
                f"differs from {paths[0]} in {_shown(unequal)}."
            )
    return stored


def _list(path: Path) -> StoredTensors:
    if not (path / CONFIG).is_file():
        raise ValueError(f"`folders` must be local folders with a {CONFIG}, got {path}.")
    if read_json(path / CONFIG, "folders").get("quantization_config") is not None:
        raise ValueError(f"`folders` must have weights that are not quantized, got {path}.")
    try:
        stored = list_tensors(path)
    except ValueError as error:
        raise ValueError(f"`folders`: {path}: {error}") from error
    if stored.absent:
        raise ValueError(f"`folders`: {path} has an index with tensors that no file has: {_shown(stored.absent)}.")
    return stored


def _fields(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a configuration that must not differ, those of sections with dotted names."""
    for name, value in config.items():
        if any(fnmatch(name, pattern) for pattern in MAY_DIFFER):
            continue
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def _config_differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**first, **other} if first.get(name, ...) != other.get(name, ...)]
    values = [f"{name} {_value(other, name)} instead of {_value(first, name)}" for name in names]
    return [f"{CONFIG} has {_shown(values)}"] if names else []


def _value(config: Mapping[str, Any], name: str) -> str:
    return f"{config[name]!r:.60}" if name in config else "missing"


def _tensor_differences(first: StoredTensors, other: StoredTensors) -> list[str]:
    ours, theirs = first.tensors, other.tensors
    common = [name for name in ours if name in theirs]
    found = {
        "missing tensors": [name for name in ours if name not in theirs],
        "further tensors": [name for name in theirs if name not in ours],
        "other shapes": [
            f"{name} {theirs[name].shape} instead of {ours[name].shape}"
            for name in common
            if theirs[name].shape != ours[name].shape
        ],
        "other dtypes": [
            f"{name} {theirs[name].dtype} instead of {ours[name].dtype}"
            for name in common
            if theirs[name].dtype != ours[name].dtype
        ],
    }
    return [f"{problem}: {_shown(names)}" for problem, names in found.items() if names]


def _vocabulary_differences(first: Path, other: Path) -> list[str]:
    """Files of the vocabulary that both folders have and that differ."""
    differing = [name for name in VOCABULARIES if _differ(first / name, other / name)]
    name = "tokenizer.json"
    if (first / name).is_file() and (other / name).is_file() and _tokens(first / name) != _tokens(other / name):
        differing.append(name)
    return [f"other tokens in {_shown(differing)}"] if differing else []


def _differ(first: Path, other: Path) -> bool:
    return first.is_file() and other.is_file() and first.read_bytes() != other.read_bytes()


def _tokens(path: Path) -> list[Any]:
    fields = read_json(path, "folders")
    model = fields.get("model") or {}
    added = [(token.get("id"), token.get("content")) for token in fields.get("added_tokens") or []]
    return [model.get("vocab"), model.get("merges"), added]


def _integer_names(stored: StoredTensors) -> list[str]:
    return [name for name, tensor in stored.tensors.items() if tensor.dtype not in FLOATING]


def _is_equal(first: StoredTensors, other: StoredTensors, name: str) -> bool:
    with (
        TensorBytes(first.folder / first.tensors[name].file) as ours,
        TensorBytes(other.folder / other.tensors[name].file) as theirs,
    ):
        return all(one == two for one, two in zip(ours.read(name, PIECE), theirs.read(name, PIECE), strict=True))


def _shown(names: Sequence[str]) -> str:
    further = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*sorted(names)[:SHOWN], *further])
