"""Published folders: JSON files, and the checks of config.json that the families share."""

import json
import math
import os
import reprlib
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig

ConfigT = TypeVar("ConfigT")

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


def read_json(path: Path, argument: str = "folder") -> dict[str, Any]:
    """Read a file with one JSON object, in UTF-8 with or without byte order mark.

    Args:
        path: The file.
        argument: The argument that it comes from, for the error message.

    Raises:
        ValueError: If it holds something else, or if its values are nested too deeply to be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError(f"`{argument}` has a {path.name} whose values are nested too deeply to be read.") from None
    except ValueError as error:
        raise ValueError(f"`{argument}` has a {path.name} that is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{argument}` must have a {path.name} with one JSON object, got {type(value).__name__}.")
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
    if not isinstance(named, list) or not all(name in architectures for name in named):
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


def require_numbers(fields: Mapping[str, Any], where: str, *names: str, integers: bool = False) -> None:
    """Check that fields of config.json are numbers, if they are present and not null.

    Args:
        fields: The fields.
        where: As in [`require_fields`].
        *names: The names of the fields.
        integers: Whether they must be integers.

    Raises:
        ValueError: If a field is something else, also true, false, NaN and infinity; names it.
    """
    kind = int if integers else (int, float)
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
            _raise_unfit(name, "an integer" if integers else "a finite number", where, value)


def require_known(fields: Mapping[str, Any], where: str, name: str, known: Collection[str]) -> None:
    """Check that a field of config.json has a known name as its value.

    Args:
        fields: The fields.
        where: As in [`require_fields`].
        name: The name of the field.
        known: The known values.

    Raises:
        ValueError: If it has another value.
    """
    value = fields.get(name)
    if not isinstance(value, str) or value not in known:
        _raise_unfit(name, "a known one", where, value)


def _raise_unfit(name: str, expected: str, where: str, value: Any) -> NoReturn:
    section = f" in {where}" if where else ""
    raise ValueError(
        f"`folder` must have a config.json whose {name} is {expected}{section}, got {reprlib.repr(value)}."
    )


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
    except (StrictDataclassError, ValueError, TypeError, KeyError, RecursionError) as error:
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


def get_rope_theta(config: Any, family: str) -> float:
    """The base of the rotary positions of a text model without scaled ones.

    Args:
        config: The text model's configuration.
        family: The name of the published model, which has no scaled rotary positions.

    Raises:
        ValueError: If the positions are scaled.
    """
    rope = dict(config.rope_parameters or {})
    theta: float = rope.pop("rope_theta")
    if rope.pop("rope_type", "default") != "default" or rope:
        raise ValueError(
            f"`model` must have `rope_parameters` with 'rope_theta' only for {family}, got {config.rope_parameters}."
        )
    return theta


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to write to, whose files are in `folder` once the block ends without an error.

    It is beside a new folder, which it becomes by renaming, and inside an existing one, which keeps its identity (it
    may be a mounted volume, a link or the working directory). After an error, everything is as before.

    Raises:
        ValueError: If `folder` is a file or a folder that is not empty (a model may be mapped from its files), or if
            it is a link to nothing or inside something that is no folder.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got {str(path)!r}.")
    missing = [one for one in (path, *path.parents) if not one.is_dir()]
    blocked = [one for one in missing if os.path.lexists(one)]
    if blocked:
        raise ValueError(f"`folder` must be a path of folders, got {str(path)!r}, where {blocked[0]} is none.")
    temporary = (path if path.is_dir() else path.parent) / f".{path.name}-{uuid.uuid4().hex}.tmp"
    moved: list[Path] = []
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if temporary.parent == path:
            # config.json last: a folder without it is no checkpoint.
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == CONFIG):
                moved.append(file.rename(path / file.name))
            temporary.rmdir()
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for file in moved:
            file.unlink(missing_ok=True)
        for one in missing[1:]:
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()
        raise


def write_config(folder: Path, fields: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write config.json with the dtype of the weights."""
    write_json(folder / CONFIG, {**fields, "torch_dtype": str(dtype).removeprefix("torch.")})


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Read the generation options of generation_config.json; None if there is no such file.

    Raises:
        ValueError: If the file does not hold generation options.
    """
    if not (folder / GENERATION_CONFIG).is_file():
        return None
    fields = read_json(folder / GENERATION_CONFIG)
    suppressed = fields.get("suppress_tokens")
    if suppressed is not None and not (isinstance(suppressed, list) and all(type(one) is int for one in suppressed)):
        raise ValueError(
            f"`folder` must have a {GENERATION_CONFIG} whose suppress_tokens are a list of integers, got "
            f"{reprlib.repr(suppressed)}."
        )
    try:
        return GenerationConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"`folder` has a {GENERATION_CONFIG} whose fields do not fit: {error}") from error
