"""Folders with small random tensors of several dtypes for the tests of soups."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints.files import write_folder

CONFIG = {"model_type": "any", "hidden_size": 4, "text_config": {"layers": 2, "attention_dropout": 0.0}}
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "a.weight": ((7, 5), torch.float32),
    "b.weight": ((3, 11), torch.bfloat16),
    "c.weight": ((13,), torch.float16),
    "d.weight": ((2, 3, 5), torch.float64),
    "empty": ((0, 4), torch.float32),
    "number": ((), torch.float32),
}


def tensors(seed: int, **changes: Tensor) -> dict[str, Tensor]:
    """Random tensors, and equal integers and bools."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in SHAPES.items()}
    same = {"positions": torch.arange(6), "mask": torch.tensor([True, False])}
    return {**drawn, **same, **changes}


def folder(path: Path, seed: int, config: dict[str, Any] | None = None, shards: int = 3, **changes: Tensor) -> Path:
    """Write a folder with random tensors."""
    return write_folder(path, tensors(seed, **changes), {**CONFIG, **(config or {})}, shards)


def folders(path: Path, count: int) -> list[Path]:
    """Write folders with other tensors each, and shards that differ."""
    return [folder(path / f"model{seed}", seed, shards=1 + (seed + 2) % 3) for seed in range(count)]
