"""One thread: the models are so small that a second one costs more than it brings."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
