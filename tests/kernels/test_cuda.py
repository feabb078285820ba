"""CUDA kernels: registration, choice of kernel, and the call to PyTorch's flash attention."""

import sys

import pytest
import torch

from tests.parts.attention_oracle import SEGMENTS, assert_like_oracle, boundaries, inputs, oracle
from vlparts.kernels.cuda import packed_attention_cuda, varlen_applies


@pytest.mark.parametrize("key", ["CUDA", "AutogradCUDA"])
def test_the_kernel_is_registered(key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("vlparts::varlen_attention", key)


def test_flash_attention_is_used_only_for_supported_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    assert varlen_applies(q, q, q)
    assert not varlen_applies(q.float(), q.float(), q.float())
    assert not varlen_applies(q, q, q[..., :4])
    assert not varlen_applies(q[..., :4], q[..., :4], q[..., :4])
    assert not varlen_applies(q[:0], q, q)
    assert not varlen_applies(q, q[:0], q[:0])
    wide = torch.zeros(4, 2, 264, dtype=torch.bfloat16)
    assert not varlen_applies(wide, wide, wide)
    assert not varlen_applies(q, q, q.transpose(1, 2).contiguous().transpose(1, 2))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert not varlen_applies(q, q, q)


def test_the_cuda_kernel_calls_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors: the arguments are accepted, and the shape of the result is right."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    query, key, value = (
        torch.empty(n, h, 64, dtype=torch.float16, device="meta") for n, h in ((6, 4), (9, 2), (9, 2))
    )
    cu_q, cu_k = boundaries([1, 5]).to("meta"), boundaries([4, 5]).to("meta")
    output = packed_attention_cuda(query, key, value, cu_q, cu_k, 5, 5, 0.5, True)
    assert output.shape == query.shape
    assert output.dtype == torch.float16


def test_the_cuda_kernel_uses_the_reference_for_other_inputs() -> None:
    segments = SEGMENTS["cross"]
    tensors = inputs(segments)
    output = packed_attention_cuda(*tensors, *map(boundaries, segments), 5, 4)
    assert_like_oracle(output, tensors, segments, False, 1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["self", "equal apart", "empty", "cross", "no keys", "no queries", "long"])
def test_on_a_device_it_agrees_with_dense_attention(name: str, causal: bool) -> None:
    segments = SEGMENTS[name]
    tensors = tuple(x.detach().cuda().requires_grad_() for x in inputs(segments, key_heads=2, dtype=torch.bfloat16))
    cu_q, cu_k = (boundaries(lengths).cuda() for lengths in segments)
    output = torch.ops.vlparts.varlen_attention(*tensors, cu_q, cu_k, max(segments[0]), max(segments[1]), None, causal)
    assert varlen_applies(*tensors)
    on_host = [x.detach().cpu().requires_grad_() for x in tensors]
    expected = oracle(*on_host, *segments, causal)
    torch.testing.assert_close(output.cpu().double(), expected, rtol=2e-2, atol=2e-2)
    direction = torch.randn_like(expected)
    found = torch.autograd.grad((output.cpu().double() * direction).sum(), tensors)
    wanted = torch.autograd.grad((expected * direction).sum(), on_host)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.cpu(), reference, rtol=2e-2, atol=8e-2)
