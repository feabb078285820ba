"""Every kernel on the stand-in: registered, checked, right forward and backward, by the device kernels meant."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

import vlparts  # noqa: F401 (loads the backends)
from tests.npu_stub.cann import Cann
from tests.npu_stub.numerics import Numerics
from vlparts_npu.self_check import KERNELS, USES, check_all, find_fault, forget_results

# What each kernel launches besides copies and fills.
LAUNCHED = {
    "npu_grouped": {
        "aclnnGroupedMatmulV5",
        "aclnnMoeTokenPermute",
        "aclnnMoeTokenPermuteGrad",
        "aclnnMoeTokenUnpermute",
        "aclnnMoeTokenUnpermuteGrad",
        "aclnnScatterAdd",
        "aclnnSwiGlu",
        "aclnnSwiGluGrad",
    },
    "vlparts::gelu": {"aclnnGeluV2", "aclnnGeluBackwardV2"},
    "vlparts::packed_attention": {
        "aclnnFlashAttentionVarLenScore",
        "aclnnFlashAttentionUnpaddingScoreGrad",
        "aclnnFusedInferAttentionScoreV2",
    },
    "vlparts::rms_norm": {"aclnnRmsNorm", "aclnnRmsNormGrad"},
    "vlparts::rotary": {"aclnnRotaryPositionEmbeddingV2", "aclnnRotaryPositionEmbeddingGrad"},
    "vlparts::rotary_pair": {"aclnnRotaryPositionEmbeddingV2", "aclnnRotaryPositionEmbeddingGrad"},
    "vlparts::swiglu": {"aclnnSwiGlu", "aclnnSwiGluGrad"},
}
each_kernel = pytest.mark.parametrize("name", LAUNCHED)


def test_the_table_is_complete() -> None:
    assert LAUNCHED.keys() == KERNELS.keys()


@each_kernel
def test_it_is_registered(name: str) -> None:
    if not name.startswith("vlparts::"):
        assert name in ExpertsInterface()
        return
    assert hasattr(torch.ops.vlparts, name.removeprefix("vlparts::"))
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@each_kernel
def test_it_equals_its_reference(name: str, numerics: Numerics, cann: Cann) -> None:
    assert find_fault(KERNELS[name], "npu") == ""
    assert LAUNCHED[name] <= cann.counts().keys()
    assert numerics.mismatches == []
    assert numerics.not_run == []


@pytest.mark.parametrize(
    ("operation", "arguments", "node"),
    [
        (torch.ops.vlparts.rms_norm, (torch.randn(3, 8), torch.randn(8), 1e-6), "NpuRmsNormBackward0"),
        (torch.ops.vlparts.gelu, (torch.randn(3, 8),), "NpuGeluBackward0"),
        (torch.ops.vlparts.swiglu, (torch.randn(3, 8),), "NpuSwigluBackward0"),
    ],
)
def test_the_dispatcher_finds_it(
    operation: Callable[..., Tensor], arguments: tuple, node: str, numerics: Numerics, cann: Cann
) -> None:
    check_all("npu")
    on_npu = [x.to("npu").requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
    cann.clear()
    found = operation(*on_npu)
    assert found.grad_fn is not None
    assert found.grad_fn.name() == node
    assert len(cann.kernels()) == 1
    torch.testing.assert_close(found.detach().cpu(), operation(*arguments))


def test_parts_of_one_projection_are_rotated_in_three_launches(numerics: Numerics, cann: Cann) -> None:
    check_all("npu")
    projection, angles = torch.randn(5, 3, 2, 8).bfloat16(), torch.randn(2, 5, 4).repeat(1, 1, 2)
    found = []
    for device in ("npu", "cpu"):
        moved = projection.to(device).requires_grad_()
        query, key, value = moved.unbind(1)
        cann.clear()
        outputs = torch.ops.vlparts.rotary_pair(query, key, *angles.to(device))
        launched = cann.kernels()
        torch.stack([*outputs, value]).backward(torch.ones(3, 5, 2, 8, dtype=torch.bfloat16, device=device))
        found.append([x.detach().cpu() for x in (*outputs, moved.grad)])
        if device == "npu":
            assert launched == ["aclnnInplaceCopy", "aclnnRotaryPositionEmbeddingV2", "aclnnInplaceCopy"]
            assert all(x.is_contiguous() for x in outputs)
            assert cann.counts()["aclnnRotaryPositionEmbeddingGrad"] == 1
    torch.testing.assert_close(*found)


def test_the_first_use_checks_once(numerics: Numerics, cann: Cann) -> None:
    forget_results()
    tensor, weight = torch.randn(3, 8).to("npu"), torch.ones(8).to("npu")
    cann.clear()
    torch.ops.vlparts.rms_norm(tensor, weight, 1e-6)
    assert cann.counts()["aclnnRmsNorm"] > 1
    cann.clear()
    torch.ops.vlparts.rms_norm(tensor, weight, 1e-6)
    assert cann.kernels() == ["aclnnRmsNorm"]
    assert [use.reason for use in USES if use.name == "vlparts::rms_norm"] == ["", ""]


def test_what_is_not_supported_runs_the_reference(numerics: Numerics) -> None:
    check_all("npu")
    USES.clear()
    found = torch.ops.vlparts.rms_norm(torch.ones(3, 8, dtype=torch.float64).to("npu"), torch.ones(8).to("npu"), 0.0)
    assert torch.equal(found.cpu(), torch.ones(3, 8, dtype=torch.float64))
    assert USES[-1].reason
