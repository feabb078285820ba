"""Files of tensors: what is written is what safetensors writes, one tensor after the other."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlparts.checkpoints._safetensors import write_tensors


def test_files_have_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    """All floating-point dtypes, an empty tensor, a scalar, and one that is not contiguous."""
    dtypes = {"b": torch.bfloat16, "a": torch.float32, "d": torch.float64, "c": torch.float16}
    tensors = {name: torch.randn(3, 5).to(dtype) for name, dtype in dtypes.items()}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "turned": torch.randn(4, 6).bfloat16().T}
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_tensors(tmp_path, meta, tensors.__getitem__, "1GB")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_no_tensor_is_kept_while_the_next_is_made(tmp_path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []

    def get_tensor(name: str) -> Tensor:
        assert all(one() is None for one in made)
        tensor = torch.full((8,), float(name))
        made.append(weakref.ref(tensor))
        return tensor

    write_tensors(tmp_path, {str(index): torch.empty(8, device="meta") for index in range(9)}, get_tensor, 100)
    assert len(made) == 9


def test_integers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights of the dtypes F64, F32, BF16, F16, got torch.int64 in n"):
        write_tensors(tmp_path, {"n": torch.empty(2, dtype=torch.int64, device="meta")}, lambda _: torch.ones(2), 100)
