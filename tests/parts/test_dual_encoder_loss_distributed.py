"""Two processes over gloo against one process with the pairs of both."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from tests.parts.test_dual_encoder_loss import LOSSES, chunked, gradients, inputs, plain

pytestmark = pytest.mark.slow  # processes that import everything anew

PROCESSES = 2
WIDTH = 4
# Real and padding pairs of each process.
BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "equal": ([1, 1, 1, 1], [1, 1, 1, 1]),
    "uneven": ([1, 1, 1], [1, 1, 1, 1, 1]),
    "masked": ([1, 0, 1, 1], [0, 1, 1, 0, 1]),
    "no pairs in one": ([], [1, 1, 1]),
    "no real pair in one": ([1, 1, 1], [0, 0]),
    "no real pair": ([0], [0, 0]),
}


class Towers(nn.Module):
    """Two linear towers, a scale and a bias."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        weights = inputs(WIDTH, WIDTH, seed=1)
        self.image, self.text, self.scale, self.bias = (nn.Parameter(weight.detach()) for weight in weights)

    def forward(self, images: Tensor, texts: Tensor, mask: Tensor | None) -> Tensor:
        features = images @ self.image, texts @ self.text, self.scale, self.bias
        if mask is None:
            return plain(self.kind, *features)
        return chunked(self.kind, *features, chunk_size=2, pair_mask=mask)


def batch(name: str) -> tuple[list[Tensor], Tensor, list[int]]:
    """Features of all processes, with junk in padding; which pairs are real; the first pair of each process."""
    parts = BATCHES[name]
    mask = torch.tensor([*parts[0], *parts[1]], dtype=torch.bool)
    tensors = inputs(len(mask), WIDTH)
    with torch.no_grad():
        tensors[0][~mask] = torch.nan
    return tensors, mask, [0, len(parts[0]), len(mask)]


def losses_and_gradients(rank: int) -> Iterator[tuple[str, Tensor]]:
    """What this process gets for every batch."""
    for kind in LOSSES:
        for name in BATCHES:
            tensors, mask, bounds = batch(name)
            own = slice(bounds[rank], bounds[rank + 1])
            mine = [tensor.detach()[own].requires_grad_() for tensor in tensors[:2]] + tensors[2:]
            loss = chunked(kind, *mine, chunk_size=2, pair_mask=mask[own])
            yield f"{kind} {name} loss", loss
            # Each process weights the loss in its own way.
            for index, gradient in enumerate(gradients(loss * (rank + 1), mine)):
                yield f"{kind} {name} gradient {index}", gradient


def gradients_of_ddp(rank: int) -> Iterator[tuple[str, Tensor]]:
    """What DistributedDataParallel leaves in the parameters."""
    for kind in LOSSES:
        tensors, mask, bounds = batch("masked")
        own = slice(bounds[rank], bounds[rank + 1])
        images, texts = (tensor.detach()[own].nan_to_num() for tensor in tensors[:2])
        model = nn.parallel.DistributedDataParallel(Towers(kind), find_unused_parameters=True)
        model(images, texts, mask[own]).backward()
        for name, parameter in model.module.named_parameters():
            if parameter.grad is not None:
                yield f"{kind} ddp {name}", parameter.grad


def messages(rank: int) -> Iterator[tuple[str, Tensor]]:
    """Whether bad input is refused, and whether groups are obeyed."""
    images, texts, scale, bias = inputs(3, WIDTH + rank)
    try:
        chunked("softmax", images, texts, scale, bias)
    except ValueError as error:
        yield "widths", torch.tensor("got [4, 5]" in str(error))
    first = distributed.new_group([0])
    images, texts, scale, bias = inputs(3 + rank, WIDTH, seed=rank)
    yield "local", chunked("sigmoid", images, texts, scale, bias, group="local")
    yield "world", chunked("sigmoid", images, texts, scale, bias, group=distributed.group.WORLD)
    try:
        yield "group", chunked("sigmoid", images, texts, scale, bias, group=first)
    except ValueError as error:
        yield "group", torch.tensor("`group` must hold this process" in str(error))


def work(rank: int, folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=PROCESSES)
    found = {**dict(losses_and_gradients(rank)), **dict(gradients_of_ddp(rank)), **dict(messages(rank))}
    save_file({name: value.detach().contiguous() for name, value in found.items()}, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Results by process."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), PROCESSES)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("kind", LOSSES)
def test_equals_one_process_with_all_pairs(found: list[dict[str, Tensor]], kind: str, name: str) -> None:
    tensors, mask, bounds = batch(name)
    real = [tensor.detach()[mask].requires_grad_() for tensor in tensors[:2]] + tensors[2:]
    expected = plain(kind, *real) if mask.any() else sum(tensor.sum() for tensor in real) * 0
    for result in found:
        torch.testing.assert_close(result[f"{kind} {name} loss"], expected.detach(), atol=1e-12, rtol=1e-12)
    # The gradient of the sum of what the processes return, with their weights 1 and 2.
    wanted = gradients(expected * 3, real)
    for index in range(2):
        got = torch.cat([result[f"{kind} {name} gradient {index}"] for result in found])
        assert bounds[-1] == len(got)
        assert not got[~mask].any()
        torch.testing.assert_close(got[mask], wanted[index], atol=1e-12, rtol=1e-12)
    for index in (2, 3):
        got = sum(result[f"{kind} {name} gradient {index}"] for result in found)
        torch.testing.assert_close(got, wanted[index], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_ddp_leaves_the_gradient_of_the_whole_batch(found: list[dict[str, Tensor]], kind: str) -> None:
    tensors, mask, _ = batch("masked")
    model = Towers(kind)
    model(tensors[0][mask], tensors[1][mask], None).backward()
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert {"image", "text", "scale"} <= set(names)
    for result in found:
        for name in names:
            got, wanted = result[f"{kind} ddp {name}"], model.get_parameter(name).grad
            torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def test_all_processes_refuse_different_widths(found: list[dict[str, Tensor]]) -> None:
    assert all(result["widths"] for result in found)


def test_groups_are_obeyed(found: list[dict[str, Tensor]]) -> None:
    own = [inputs(3 + rank, WIDTH, seed=rank) for rank in range(PROCESSES)]
    for result, tensors in zip(found, own, strict=True):
        torch.testing.assert_close(result["local"], plain("sigmoid", *tensors).detach())
    torch.testing.assert_close(found[0]["group"], plain("sigmoid", *own[0]).detach())
    assert found[1]["group"].item() is True
    assert found[0]["world"] != found[0]["local"]
