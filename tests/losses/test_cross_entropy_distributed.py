"""Two processes over gloo against one process with the samples of both."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from tests.losses.loss_oracle import IGNORED, assert_equal, drawn, gradients, looped_loss, make_case
from tests.losses.test_normalizer import LENGTHS, select
from vlparts.losses.cross_entropy import weighted_cross_entropy
from vlparts.losses.normalizer import LossNormalizer

PROCESSES, WIDTH = 2, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "token": dict(preset="token"),
    "sample": dict(preset="sample"),
    "square": dict(preset="square"),
    "mix": dict(mix=0.3, length_exponent=0.7),
}
# The samples of each micro-batch of each process.
SPLITS: dict[str, list[list[list[int]]]] = {
    "equal": [[[0, 1, 2]], [[3, 4, 5]]],
    "uneven": [[[3]], [[1, 5], [0], [2, 4]]],
    "nothing in one": [[[]], [[5, 4, 3], [2, 1, 0]]],
    "no micro-batch in one": [[], [[0, 1], [2, 3, 4, 5]]],
    "no label in one": [[[2]], [[0, 1], [3, 4, 5]]],
}


def step(rank: int, split: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The loss of this process, and its gradient for all logits."""
    case, normalizer = make_case(LENGTHS), LossNormalizer(**options)
    parts = [select(case, samples) for samples in SPLITS[split][rank]]
    for part in parts:
        normalizer.add(part.labels, **part.weighting)
    normalizer.all_reduce()
    losses = [weighted_cross_entropy(p.logits, p.labels, **p.weighting, **normalizer.options) for p in parts]
    loss = sum(losses, case.logits.sum() * 0)
    return loss, gradients(loss, case.logits)[0]


def gradients_of_ddp(rank: int) -> Iterator[tuple[str, Tensor]]:
    """What DistributedDataParallel leaves in the parameters, after two micro-batches in each process."""
    case, hidden = make_case(LENGTHS), drawn(sum(LENGTHS), WIDTH)
    head = nn.Linear(WIDTH, case.logits.shape[1]).double()
    nn.init.constant_(head.bias, 0.1)
    head.weight.data = drawn(*head.weight.shape, seed=4)
    model, normalizer = nn.parallel.DistributedDataParallel(head), LossNormalizer("square")
    batches = [[0, 1], [2, 4]] if rank == 0 else [[3], [5]]
    parts = [select(case._replace(logits=hidden), samples) for samples in batches]
    for part in parts:
        normalizer.add(part.labels, **part.weighting)
    normalizer.all_reduce()
    for part in parts:
        loss = weighted_cross_entropy(model(part.logits), part.labels, **part.weighting, **normalizer.options)
        (PROCESSES * loss).backward()
    yield "ddp weight", head.weight.grad
    yield "ddp bias", head.bias.grad


def groups(rank: int) -> Iterator[tuple[str, Tensor]]:
    """Denominators over a group of one."""
    group = [distributed.new_group([process]) for process in range(PROCESSES)][rank]
    normalizer = LossNormalizer("token")
    normalizer.add(torch.zeros(3 + rank).long())
    normalizer.all_reduce(group, device="cpu")
    yield "group", normalizer.tokens


def work(rank: int, folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=PROCESSES)
    found = {**dict(gradients_of_ddp(rank)), **dict(groups(rank))}
    for name, options in OPTIONS.items():
        for split in SPLITS:
            found[f"{name} {split} loss"], found[f"{name} {split} gradient"] = step(rank, split, options)
    save_file({name: value.detach().clone() for name, value in found.items()}, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Results by process."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), PROCESSES)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(PROCESSES)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_gradients_add_up_to_those_of_one_process(
    found: list[dict[str, Tensor]], name: str, split: str
) -> None:
    case, normalizer = make_case(LENGTHS), LossNormalizer(**OPTIONS[name])
    whole = weighted_cross_entropy(case.logits, case.labels, **case.weighting, **OPTIONS[name])
    total = sum(result[f"{name} {split} loss"] for result in found)
    assert_equal(total.item(), looped_loss(case, normalizer.mix, normalizer.length_exponent), 1e-12)
    gradient = sum(result[f"{name} {split} gradient"] for result in found)
    assert_equal(gradient, gradients(whole, case.logits)[0], 1e-12)
    assert not gradient[case.labels == IGNORED].any()


def test_ddp_leaves_the_gradient_of_the_whole_batch(found: list[dict[str, Tensor]]) -> None:
    case, hidden = make_case(LENGTHS), drawn(sum(LENGTHS), WIDTH)
    weight = drawn(case.logits.shape[1], WIDTH, seed=4).requires_grad_()
    bias = torch.full((len(weight),), 0.1, dtype=torch.float64, requires_grad=True)
    logits = nn.functional.linear(hidden, weight, bias)
    expected = weighted_cross_entropy(logits, case.labels, preset="square", **case.weighting)
    wanted = gradients(expected, weight, bias)
    for result in found:
        assert_equal((result["ddp weight"], result["ddp bias"]), wanted, 1e-12)


def test_groups_are_obeyed(found: list[dict[str, Tensor]]) -> None:
    assert [result["group"].item() for result in found] == [3, 4]
