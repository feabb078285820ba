"""Sums over processes; two processes are in test_losses_distributed.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from vlparts.losses._distributed import sum_over_processes

VALUES = torch.tensor([1 / 3, -2e-300, 7e300, torch.inf], dtype=torch.float64)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_without_processes_values_stay_as_they_are() -> None:
    assert sum_over_processes(VALUES) is VALUES


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_one_process_has_its_own_values(alone: None, device: Any) -> None:
    total = sum_over_processes(VALUES, device=device)
    assert total.dtype == torch.float64
    assert total.tolist() == VALUES.tolist()


def test_nothing_that_is_sent_is_float64(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, real = [], distributed.all_gather

    def noted(every: list[Tensor], own: Tensor, **options: Any) -> Any:
        sent.extend([own.dtype, *(one.dtype for one in every)])
        return real(every, own, **options)

    monkeypatch.setattr(distributed, "all_gather", noted)
    monkeypatch.delattr(distributed, "all_reduce")
    sum_over_processes(VALUES)
    assert sent == [torch.int32, torch.int32]
