"""Each kernel on the CANN stub: registration, values and gradients, and the device kernels that it launches."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

import vlparts.registration  # noqa: F401 (loads the backends)
from tests.npu_stub.cann import Cann
from tests.npu_stub.numerics import Numerics
from vlparts_npu.self_check import CALL_LOG, KERNELS, check_all, check_kernel, reset_checks

# Device kernels that each kernel launches, without copies and fills.
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
    "vlparts::varlen_attention": {
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
    assert check_kernel(KERNELS[name], "npu") == ""
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
def test_the_dispatcher_calls_it(
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


@pytest.mark.parametrize(("cross", "host_lengths", "copies"), [(False, False, 1), (True, False, 2), (True, True, 0)])
def test_missing_host_lengths_are_copied_once_per_call(
    cross: bool, host_lengths: bool, copies: int, numerics: Numerics
) -> None:
    check_all("npu")
    CALL_LOG.clear()
    query, keys = torch.randn(9, 2, 8), torch.randn(2, 12 if cross else 9, 2, 8)
    bounds = ([0, 4, 9], [0, 5, 12] if cross else [0, 4, 9])
    cu_seqlens = [torch.tensor(one, dtype=torch.int32) for one in (bounds if cross else bounds[:1])]
    expected = torch.ops.vlparts.varlen_attention(query, *keys, cu_seqlens[0], cu_seqlens[-1], 7, 7)
    tensors = [x.to("npu") for x in (query, *keys, *cu_seqlens)]
    numerics.waits.clear()
    given = {"cu_seqlens_q_cpu": bounds[0], "cu_seqlens_k_cpu": bounds[1]} if host_lengths else {}
    found = torch.ops.vlparts.varlen_attention(*tensors[:4], tensors[-1], 7, 7, **given)
    assert len(numerics.waits) == copies
    assert list(CALL_LOG) == [("vlparts::varlen_attention", "")]
    torch.testing.assert_close(found.cpu(), expected)


def test_views_of_one_projection_are_rotated_in_three_launches(numerics: Numerics, cann: Cann) -> None:
    check_all("npu")
    projection, cos_sin = torch.randn(5, 3, 2, 8).bfloat16(), torch.randn(2, 5, 4).repeat(1, 1, 2)
    found = []
    for device in ("npu", "cpu"):
        moved = projection.to(device).requires_grad_()
        query, key, value = moved.unbind(1)
        cann.clear()
        outputs = torch.ops.vlparts.rotary_pair(query, key, *cos_sin.to(device))
        launched = cann.kernels()
        torch.stack([*outputs, value]).backward(torch.ones(3, 5, 2, 8, dtype=torch.bfloat16, device=device))
        found.append([x.detach().cpu() for x in (*outputs, moved.grad)])
        if device == "npu":
            assert launched == ["aclnnInplaceCopy", "aclnnRotaryPositionEmbeddingV2", "aclnnInplaceCopy"]
            assert all(x.is_contiguous() for x in outputs)
            assert cann.counts()["aclnnRotaryPositionEmbeddingGrad"] == 1
    torch.testing.assert_close(*found)


def test_only_the_first_use_checks_the_kernel(numerics: Numerics, cann: Cann) -> None:
    reset_checks()
    tensor, weight = torch.randn(3, 8).to("npu"), torch.ones(8).to("npu")
    cann.clear()
    torch.ops.vlparts.rms_norm(tensor, weight, 1e-6)
    assert cann.counts()["aclnnRmsNorm"] > 1
    cann.clear()
    torch.ops.vlparts.rms_norm(tensor, weight, 1e-6)
    assert cann.kernels() == ["aclnnRmsNorm"]
    assert [use.reason for use in CALL_LOG if use.name == "vlparts::rms_norm"] == ["", ""]


def test_unsupported_arguments_run_the_reference(numerics: Numerics) -> None:
    check_all("npu")
    CALL_LOG.clear()
    found = torch.ops.vlparts.rms_norm(torch.ones(3, 8, dtype=torch.float64).to("npu"), torch.ones(8).to("npu"), 0.0)
    assert torch.equal(found.cpu(), torch.ones(3, 8, dtype=torch.float64))
    assert CALL_LOG[-1] == ("vlparts::rms_norm", "the weight is torch.float32 and the input torch.float64")
