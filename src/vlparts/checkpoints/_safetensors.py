"""Folders of safetensors in one or several files: list, read and write tensors."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ._folder import read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# In the order in which safetensors writes tensors: wide types first, so that all data is aligned.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# Bytes of tensors that are read before their file is opened anew: pages of a mapped file count as memory of the
# process until it is closed, and the published DeepSeek-OCR is one file of 6.7 GB.
BYTES_PER_OPENING = 2**29

_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class StoredTensor(NamedTuple):
    """A tensor in a folder.

    Attributes:
        name: Its name in the file.
        file: The name of the file.
        shape: Its shape.
        dtype: Its dtype as safetensors writes it, for example "BF16".
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class StoredTensors:
    """The tensors of a folder, without their data.

    Attributes:
        folder: The folder.
        tensors: The tensors by name.
        absent: Sorted names that the index has and no file holds.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    absent: list[str]

    def renamed(self, rename: Callable[[str], str]) -> "StoredTensors":
        """The same tensors under other names.

        Raises:
            ValueError: If two tensors get the same name.
        """
        tensors: dict[str, StoredTensor] = {}
        for name, stored in self.tensors.items():
            other = tensors.setdefault(rename(name), stored)
            if other is not stored:
                raise ValueError(f"`folder` must have each tensor once, got {other.name} and {stored.name}.")
        return StoredTensors(self.folder, tensors, [rename(name) for name in self.absent])

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors file by file; their memory is mapped from the file where the system can.

        A tensor that is not kept takes memory only until some more have been read.

        Args:
            names: The tensors to read.
        """
        for file in sorted({self.tensors[name].file for name in names}):
            waiting = sorted((name for name in names if self.tensors[name].file == file), reverse=True)
            while waiting:
                read = 0
                with safe_open(self.folder / file, framework="pt") as opened:
                    while waiting and read < BYTES_PER_OPENING:
                        name = waiting.pop()
                        tensor = opened.get_tensor(self.tensors[name].name)
                        read += tensor.nbytes
                        yield name, tensor


def list_tensors(folder: Path) -> StoredTensors:
    """List a folder's tensors from the headers of its safetensors.

    Raises:
        ValueError: If there are no safetensors (pickled weights are not read), if the index is malformed or names a
            file that does not exist, if a file is broken, or if two files hold a tensor of the same name.
    """
    files, indexed = _list_files(folder)
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in found:
                        raise ValueError(f"`folder` has the tensor {name!r} twice, in {found[name].file} and {file}.")
                    header = opened.get_slice(name)
                    found[name] = StoredTensor(name, file, tuple(header.get_shape()), str(header.get_dtype()))
        except SafetensorError as error:
            raise ValueError(f"`folder` has a {file} that is no safetensors file: {error}.") from error
    return StoredTensors(folder, found, sorted(indexed - found.keys()))


def _list_files(folder: Path) -> tuple[list[str], set[str]]:
    """The names of the files, and of the tensors in the index, if there is one."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return [SINGLE], set()
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        raise ValueError(
            f"`folder` must have safetensors ({SINGLE}, or {INDEX} and its files), got {str(folder)!r} with "
            f"{', '.join(others) or 'none'}. Pickled weights are not read."
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"`folder` must have a {INDEX} with file names by tensor under 'weight_map'.")
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if Path(file).name != file or not (folder / file).is_file()]
    if missing:
        raise ValueError(f"`folder` must have the files that its {INDEX} names, but lacks {', '.join(missing)}.")
    return files, set(weight_map)


def check_max_shard_size(max_shard_size: Any) -> None:
    """Raise ValueError unless it is a positive number of bytes, as an integer or as text like "5GB"."""
    size = max_shard_size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]B)\s*", size, re.IGNORECASE | re.ASCII)
        size = int(float(match[1]) * _BYTES[match[2].upper()]) if match else 0
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            '`max_shard_size` must be a positive integer or text like "5GB" (units KB, MB, GB, TB), got '
            f"{max_shard_size!r}."
        )


def write_tensors(
    folder: Path, meta: dict[str, Tensor], get_tensor: Callable[[str], Tensor], max_shard_size: int | str
) -> None:
    """Write safetensors, and an index if there are several files. One tensor after the other is made and written.

    Args:
        folder: An existing folder.
        meta: All tensors by name, on the meta device.
        get_tensor: Returns the tensor of a name.
        max_shard_size: Largest size of a file, in bytes or like "5GB"; a larger tensor gets a file of its own.

    Raises:
        ValueError: If a tensor is not floating-point.
    """
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, {name: meta[name] for name in names}, get_tensor)
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _write_file(path: Path, meta: dict[str, Tensor], get_tensor: Callable[[str], Tensor]) -> None:
    """Write one file: the length of the header, the header, and the data without gaps."""
    dtypes = {dtype: name for name, dtype in FLOATING.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, tensor in meta.items():
        if tensor.dtype not in dtypes:
            raise ValueError(
                f"`model` must have weights of the dtypes {', '.join(FLOATING)}, got {tensor.dtype} in {name}."
            )
    order, end = list(dtypes), 0
    names = sorted(meta, key=lambda name: (order.index(meta[name].dtype), name))
    for name in names:
        tensor = meta[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            # No name is kept: a tensor is freed before the next one is made.
            file.write(get_tensor(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class TensorBytes:
    """The tensors of a safetensors file as pieces of bytes, read without mapping the file into memory.

    Use it in a `with` block.

    Args:
        path: A file that [`list_tensors`] has read without an error.

    Attributes:
        names: The names of the tensors in the order of their data.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._header = self._file.read(int.from_bytes(self._file.read(8), "little"))
        entries = {name: entry for name, entry in json.loads(self._header).items() if name != "__metadata__"}
        self._spans: dict[str, tuple[int, int]] = {name: entry["data_offsets"] for name, entry in entries.items()}
        self.names = sorted(self._spans, key=lambda name: self._spans[name])

    def read(self, name: str, size: int) -> Iterator[bytearray]:
        """Yield the bytes of a tensor in pieces of at most `size`."""
        start, end = self._spans[name]
        for position in range(start, end, size):
            piece = bytearray(min(size, end - position))
            self._file.seek(8 + len(self._header) + position)
            if self._file.readinto(piece) != len(piece):
                raise ValueError(f"`folder` has a {self._file.name} that has become shorter.")
            yield piece

    def write_like(self, path: Path, get_pieces: Callable[[str], Iterable[bytes | bytearray | memoryview]]) -> None:
        """Write a file with the same header and other values.

        Args:
            path: The file.
            get_pieces: Returns the bytes of the tensor of a name, in pieces.
        """
        with path.open("wb") as file:
            file.write(len(self._header).to_bytes(8, "little") + self._header)
            for name in self.names:
                for piece in get_pieces(name):
                    file.write(piece)

    def __enter__(self) -> "TensorBytes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
