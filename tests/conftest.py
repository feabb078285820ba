"""What every test shares: a private offline cache, fixed seeds, two threads, and the hypothesis profile."""

import atexit
import functools
import os
import shutil
import tempfile

# Before transformers or matplotlib is imported: they read the environment once.
_home = tempfile.mkdtemp(prefix="vlparts-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_home, MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")
os.environ.pop("HF_MODULES_CACHE", None)
# PyTorch's own forms of the CPU kernels, so that results do not depend on what a busy machine measures.
os.environ["VLPARTS_CALIBRATE"] = "0"

import random  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


class TorchRandom:
    """Torch's random state as hypothesis wants it, so that every example of a property starts alike."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(torch_random)


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Start every test from the same random state, with two threads, and with nothing compiled."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its relatives return with NaN (integers: the largest), so that a read of
    unwritten memory shows."""
    with torch.device("meta"):
        torch.empty(0)  # PyTorch keeps a list of such functions from its first use on; these here shall not be in it

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if not tensor.is_meta and tensor.dtype != torch.bool:
                inexact = tensor.is_floating_point() or tensor.is_complex()
                with torch.no_grad():
                    tensor.fill_(float("nan") if inexact else torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
