"""Published folders: JSON files, and the checks of config.json that the families share."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.modeling_utils import PreTrainedModel

ConfigT = TypeVar("ConfigT")

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        ValueError: If it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`folder` has a {path.name} that is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`folder` must have a {path.name} with one JSON object, got {type(value).__name__}.")
    return value


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a file with one JSON object, keys sorted."""
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(folder: Path, model_type: str, architectures: Collection[str]) -> dict[str, Any]:
    """Read the config.json of a published model.

    Args:
        folder: The folder.
        model_type: The `model_type` that it must have.
        architectures: The `architectures` that it may have.

    Raises:
        ValueError: If there is none, or if it belongs to another model or to quantized weights.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"`folder` must be a local folder with a config.json, got {str(folder)!r}.")
    config = read_json(folder / CONFIG)
    if config.get("model_type") != model_type:
        raise ValueError(f"`folder` must have the model_type {model_type!r}, got {config.get('model_type')!r}.")
    named = config.get("architectures") or []
    if not set(named) <= set(architectures):
        raise ValueError(f"`folder` must have the architectures {' or '.join(architectures)}, got {named}.")
    if config.get("quantization_config") is not None:
        raise ValueError(
            "`folder` must have weights that are not quantized, got a config.json with quantization_config."
        )
    return config


def require_fields(fields: Mapping[str, Any], where: str, *names: str) -> None:
    """Check that fields of config.json are present.

    Args:
        fields: The fields.
        where: The name of the section of config.json that holds them, "" for the top level.
        *names: The required fields.

    Raises:
        ValueError: If a field is missing or null; lists all of them.
    """
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        section = f" in {where}" if where else ""
        raise ValueError(f"`folder` must have a config.json with {', '.join(missing)}{section}, got none.")


def get_head_dim(fields: Mapping[str, Any], where: str) -> int:
    """The width divided by the number of heads.

    Args:
        fields: Fields with `hidden_size` and `num_attention_heads`.
        where: As in [`require_fields`].

    Raises:
        ValueError: If they are not integers, or not divisible.
    """
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        section = f" in {where}" if where else ""
        raise ValueError(
            f"`folder` must have a config.json whose num_attention_heads divides hidden_size{section}, got {heads!r} "
            f"and {width!r}."
        )
    return width // heads


def build_config(config_class: Callable[..., ConfigT], where: str, **fields: Any) -> ConfigT:
    """Build a configuration of a part.

    Args:
        config_class: Its class.
        where: As in [`require_fields`].
        **fields: Its fields.

    Raises:
        ValueError: If the class does not accept the fields.
    """
    try:
        return config_class(**fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        # Strict configurations wrap the errors of their validators.
        reason = error.__cause__ or error
        raise ValueError(f"`folder` has a config.json whose {where or 'fields'} do not fit: {reason}") from error


def check_config(config: Any, expected: Mapping[str, Any], family: str) -> None:
    """Check the fields of a model's configuration that a published format fixes.

    Args:
        config: The configuration.
        expected: Values by field.
        family: The name of the published model.

    Raises:
        ValueError: If a field has another value; names it.
    """
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(f"`model` must have `{name}` = {value!r} for {family}, got {getattr(config, name)!r}.")


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder to write to, which is not created here.

    Raises:
        ValueError: If it is a file, or a folder that is not empty: a model may be mapped from its files.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got {str(path)!r}.")
    return path


def write_config(folder: Path, fields: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write config.json with the dtype of the weights."""
    write_json(folder / CONFIG, {**fields, "torch_dtype": str(dtype).removeprefix("torch.")})


def read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Set a model's generation options from generation_config.json, if there is one."""
    if (folder / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
