"""The global balance loss and the statistics over two processes, over gloo, against one with all tokens."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from tests.moe.test_statistics import assert_expected, expected, filled
from tests.parts.test_moe_losses import EXPERTS, MASK, case, drawn, looped
from vlparts.parts.moe_losses import balance_loss
from vlparts.parts.moe_routing import expert_counts

OWN = (slice(0, 4), slice(4, 11))


class Routed(nn.Module):
    """A linear map to logits, and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(EXPERTS, 4, seed=7))

    def forward(self, hidden: Tensor, indices: Tensor, mask: Tensor) -> Tensor:
        return balance_loss(hidden @ self.weight.T, indices, token_mask=mask, form="global")


def losses(rank: int) -> dict[str, Tensor]:
    """What this process gets for its own tokens."""
    logits, indices = case()
    own = OWN[rank]
    mine, places, mask = logits.detach()[own].requires_grad_(), indices[own], MASK[own]
    loss = balance_loss(mine, places, form="global", token_mask=mask)
    # Each process weights the loss in its own way.
    (gradient,) = torch.autograd.grad(loss * (rank + 1), mine)
    squared = balance_loss(mine, places, form="global", token_mask=mask).square()
    (slope,) = torch.autograd.grad(squared * (rank + 1), mine, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), mine)
    counts = expert_counts(indices, EXPERTS, MASK)
    given = balance_loss(mine, places, form="global", token_mask=mask, counts=counts)
    local = balance_loss(mine, places, form="global", token_mask=mask, group="local")
    batch = balance_loss(mine, places, token_mask=mask)
    model = nn.parallel.DistributedDataParallel(Routed())
    model(drawn(len(MASK), 4)[own], places, mask).backward()
    return dict(
        loss=loss,
        gradient=gradient,
        second=second,
        given=given,
        local=local,
        batch=batch,
        ddp=model.module.weight.grad,
    )


def work(rank: int, folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    found = losses(rank)
    statistics = filled(*([0], [1, 2])[rank])
    statistics.all_reduce("local")
    found["counts alone"] = statistics.tokens_per_expert
    statistics.all_reduce()
    assert_expected(statistics.compute())
    found["counts"] = statistics.tokens_per_expert
    save_file({name: value.detach().contiguous() for name, value in found.items()}, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Results by process."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), 2)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def test_the_global_loss_is_that_of_all_tokens(found: list[dict[str, Tensor]]) -> None:
    logits, indices = case()
    loss = looped(logits[MASK], indices[MASK])
    for result in found:
        for name in ("loss", "given"):
            torch.testing.assert_close(result[name], loss.detach(), atol=1e-12, rtol=1e-12)
    # The gradient of the sum of what the processes return, with their weights 1 and 2.
    (wanted,) = torch.autograd.grad(loss * 3, logits)
    torch.testing.assert_close(torch.cat([result["gradient"] for result in found]), wanted, atol=1e-12, rtol=1e-12)


def test_second_derivatives_are_those_of_all_tokens(found: list[dict[str, Tensor]]) -> None:
    logits, indices = case()
    squared = looped(logits[MASK], indices[MASK]).square()
    (slope,) = torch.autograd.grad(squared * 3, logits, create_graph=True)
    (wanted,) = torch.autograd.grad(slope.square().sum(), logits)
    torch.testing.assert_close(torch.cat([result["second"] for result in found]), wanted, atol=1e-12, rtol=1e-12)


def test_ddp_leaves_the_gradient_of_the_whole_batch(found: list[dict[str, Tensor]]) -> None:
    model = Routed()
    model(drawn(len(MASK), 4), case()[1], MASK).backward()
    for result in found:
        torch.testing.assert_close(result["ddp"], model.weight.grad, atol=1e-12, rtol=1e-12)


def test_other_forms_stay_in_their_process(found: list[dict[str, Tensor]]) -> None:
    logits, indices = case()
    for result, own in zip(found, OWN, strict=True):
        alone = looped(logits[own][MASK[own]], indices[own][MASK[own]]).detach()
        for name in ("local", "batch"):
            torch.testing.assert_close(result[name], alone, atol=1e-12, rtol=1e-12)


def test_statistics_add_up(found: list[dict[str, Tensor]]) -> None:
    assert found[0]["counts alone"].tolist() == filled(0).tokens_per_expert.tolist()
    assert found[1]["counts alone"].tolist() == filled(1, 2).tokens_per_expert.tolist()
    for result in found:
        assert result["counts"].tolist() == expected()["tokens_per_expert"]
