"""Folders of safetensors in one or several files: what they hold, their tensors one by one, and writing them."""

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor in a folder.

    Attributes:
        file: The name of its file.
        shape: Its shape.
        dtype: Its type as safetensors writes it, for example "BF16".
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


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


def stored_tensors(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """Read the headers of a folder's safetensors, and no weights.

    Returns:
        All tensors by name, and the names in the index that no file holds.

    Raises:
        ValueError: If there are no safetensors (pickled weights are not read), if the index is malformed or names a
            file that does not exist, if a file is broken, or if two files hold a tensor of the same name.
    """
    files, indexed = _files(folder)
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in found:
                        raise ValueError(f"`folder` has the tensor {name!r} twice, in {found[name].file} and {file}.")
                    header = opened.get_slice(name)
                    found[name] = Stored(file, tuple(header.get_shape()), str(header.get_dtype()))
        except SafetensorError as error:
            raise ValueError(f"`folder` has a {file} that is no safetensors file: {error}.") from error
    return found, sorted(indexed - found.keys())


def _files(folder: Path) -> tuple[list[str], set[str]]:
    """The names of the files, and of the tensors that the index names, if there is one."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return [SINGLE], set()
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        raise ValueError(
            f"`folder` must have safetensors ({SINGLE}, or {INDEX} and its files), got {str(folder)!r} with "
            f"{', '.join(others) or 'none'}. Pickled weights are not read."
        )
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"`folder` must have a {INDEX} with file names by tensor under 'weight_map'.")
    files = sorted(set(places.values()))
    lacking = [file for file in files if Path(file).name != file or not (folder / file).is_file()]
    if lacking:
        raise ValueError(f"`folder` must have the files that its {INDEX} names, but lacks {', '.join(lacking)}.")
    return files, set(places)


def read_tensors(folder: Path, stored: dict[str, Stored], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors, file after file; their memory is mapped from the file where the system can.

    Args:
        folder: The folder.
        stored: What [`stored_tensors`] found there.
        names: The tensors to read.
    """
    for file in sorted({stored[name].file for name in names}):
        with safe_open(folder / file, framework="pt") as opened:
            for name in sorted(name for name in names if stored[name].file == file):
                yield name, opened.get_tensor(name)


def write_tensors(
    folder: Path, empty: dict[str, Tensor], tensor: Callable[[str], Tensor], max_shard_size: int | str
) -> None:
    """Write safetensors, and an index where there are several files.

    Args:
        folder: An existing folder.
        empty: The shapes and types of all tensors by name, on the meta device.
        tensor: Gives the tensor of a name; it is asked for the tensors of one file at a time.
        max_shard_size: Largest size of a file, in bytes or like "5GB"; a larger tensor has a file of its own.
    """
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensor(name).detach().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
