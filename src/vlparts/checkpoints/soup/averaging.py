"""The mean of the weights of several folders, written as one folder."""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._folder import new_folder, write_json
from .._safetensors import INDEX, StoredTensors, TensorBytes
from .._weights import FLOATING
from .comparison import PIECE, check_folders

__all__ = ["SOUP", "average_folders", "check_output", "write_mean"]

SOUP = "soup.json"
"""File of a soup that says what it is made of."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
# Other weights, states of training, and what describes the first model only. Other files are copied.
_WEIGHTS = ("safetensors", "bin", "pt", "pth", "ckpt", "pkl", "h5", "msgpack", "gguf", "onnx")
_NOT_COPIED = (*(f"*.{suffix}" for suffix in _WEIGHTS), "*.index.json", "trainer_state.json", "README.md", SOUP, ".*")
_COPIED_FOLDERS = ("additional_chat_templates",)


def average_folders(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
) -> list[str]:
    """Write the mean of the weights of models as a folder: a uniform model soup (arXiv 2203.05482), or a weighted one.

    The mean is first + sum of w_i (other_i - first), in float32, or float64 for float64 tensors, and is written in
    the dtype of the tensors. Elements with the same bits in all folders are kept as they are, so the mean of equal
    models is equal to the bit. The order of the folders changes the result by a few float32 roundings of the largest
    of the averaged values, before it is rounded to the dtype of the tensors.

    Tensors are read and written in pieces of 4 MiB, so memory depends neither on the size nor on the number of the
    models. Files, index and metadata are those of the first folder, from which configuration, tokenizer, processor and
    code are copied too; not copied are pickled weights, states of training, README.md and hidden files. `soup.json`
    has the folders and their shares of the mean. After an error, nothing is left.

    Args:
        folders: Local folders of the same model, see [`check_folders`].
        output: A new or empty folder.
        weights: One finite number of at least 0 for each folder, divided by their sum; None for equal ones.

    Returns:
        Names of the files and folders of the first folder that were not copied, besides its weights.

    Raises:
        ValueError: If `folders` do not fit together, `weights` do not fit to them, or `output` has files.
    """
    shares = _shares(weights, len(folders))
    check_output(output)
    stored = check_folders(folders)
    recipe = {"recipe": "mean", "folders": [str(folder) for folder in folders], "weights": shares}
    return write_mean(stored, shares, Path(output), recipe)


def check_output(output: str | os.PathLike[str]) -> None:
    """Raise ValueError unless it is a new or an empty folder."""
    path = Path(output)
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"`output` must be a new or empty folder, got {path}.")


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count if count else []
    fit = len(weights) == count and all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) and one >= 0
        for one in weights
    )
    if not fit or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"`weights` must be {count} finite numbers of at least 0, not all of them 0, got {list(weights)}."
        )
    return [one / sum(weights) for one in weights]


def write_mean(
    stored: Sequence[StoredTensors], shares: Sequence[float], output: Path, recipe: dict[str, Any]
) -> list[str]:
    """Write the mean of checked folders.

    Args:
        stored: The tensors of the folders.
        shares: Share of each folder in the mean; their sum is 1.
        output: A new or empty folder.
        recipe: Contents of `soup.json`.

    Returns:
        As [`average_folders`].
    """
    first = stored[0]
    with new_folder(output) as folder, ExitStack() as stack:
        opened = [
            {file: stack.enter_context(TensorBytes(one.folder / file)) for file in _files(one)} for one in stored
        ]
        for file, source in opened[0].items():
            source.write_like(folder / file, lambda name: _mean_pieces(stored, opened, shares, name))
        if (first.folder / INDEX).is_file():
            shutil.copyfile(first.folder / INDEX, folder / INDEX)
        left = _copy_others(first.folder, folder)
        write_json(folder / SOUP, recipe)
    return left


def _files(stored: StoredTensors) -> list[str]:
    return sorted({tensor.file for tensor in stored.tensors.values()})


def _mean_pieces(
    stored: Sequence[StoredTensors], opened: Sequence[dict[str, TensorBytes]], shares: Sequence[float], name: str
) -> Iterator[bytes | bytearray]:
    """Yield the bytes of the mean of a tensor, in pieces."""
    dtype = FLOATING.get(stored[0].tensors[name].dtype)
    members = [index for index, share in enumerate(shares) if share]  # without those of weight 0, also if they are NaN
    readers = [opened[index][stored[index].tensors[name].file].read(name, PIECE) for index in members]
    for piece in readers[0]:
        if dtype is None:  # equal in all folders
            yield piece
            continue
        others = (torch.frombuffer(next(reader), dtype=dtype) for reader in readers[1:])
        mean = _mean(torch.frombuffer(piece, dtype=dtype), others, [shares[index] for index in members])
        yield mean.view(torch.uint8).numpy().tobytes()


def _mean(first: Tensor, others: Iterator[Tensor], shares: Sequence[float]) -> Tensor:
    """The mean of one-dimensional tensors."""
    wide = first.to(torch.float64 if first.dtype == torch.float64 else torch.float32)
    bits = _BITS[first.element_size()]
    change, same = torch.zeros_like(wide), torch.ones_like(wide, dtype=torch.bool)
    for other, share in zip(others, shares[1:], strict=True):
        change.add_(other.to(wide.dtype) - wide, alpha=share)
        same &= other.view(bits) == first.view(bits)
    return torch.where(same, first, (wide + change).to(first.dtype))


def _copy_others(source: Path, target: Path) -> list[str]:
    """Copy the files beside the weights; returns the names of those that are not copied."""
    left = []
    written = {path.name for path in target.iterdir()}
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in _COPIED_FOLDERS:
            shutil.copytree(path, target / path.name)
        elif path.is_dir() or any(path.match(pattern) for pattern in _NOT_COPIED):
            left += [] if path.name in written else [path.name]
        else:
            shutil.copyfile(path, target / path.name)
    return left
