"""The CPU kernel of packed attention against the reference: batches of runs, and bfloat16 training."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests.kernels.cpu.forms import prefer_forms
from tests.parts.attention_oracle import assert_like_oracle, boundaries, cases, flags, inputs
from vlparts.kernels.cpu import attention as attention_cpu
from vlparts.kernels.cpu.attention import packed_attention_cpu
from vlparts.parts.ops_attention import dense_attention_forward, packed_attention
from vlparts.parts.ops_attention_reference import packed_attention_reference


@pytest.mark.parametrize("key", ["CPU", "AutogradCPU"])
def test_the_kernel_is_registered(key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("vlparts::varlen_attention", key)


@cases
@flags
@pytest.mark.parametrize("batch_up_to", [0, 4, 32])
@pytest.mark.parametrize("with_host_lengths", [False, True])
def test_output_and_gradients_are_those_of_the_reference(
    segments: tuple[list[int], list[int]],
    causal: bool,
    batch_up_to: int,
    with_host_lengths: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_cpu, "BATCH_UP_TO", batch_up_to)
    tensors, bounds = inputs(segments, key_heads=2), [boundaries(lengths) for lengths in segments]
    host = [one.tolist() for one in bounds] if with_host_lengths else [None, None]
    output = packed_attention_cpu(*tensors, *bounds, 0, 0, None, causal, *host)
    expected = packed_attention_reference(*tensors, *bounds, 0, 0, None, causal)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad((x * direction).sum(), tensors) for x in (output, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bounds", [[0, 2], [1, 4], [0, 5], [0, 3, 2, 4]])
@pytest.mark.parametrize("with_host_lengths", [False, True])
def test_boundaries_must_cover_the_tokens(bounds: list[int], with_host_lengths: bool) -> None:
    tensors, bad = inputs(([4], [4])), torch.tensor(bounds, dtype=torch.int32)
    host = [bounds, bounds] if with_host_lengths else [None, None]
    with pytest.raises(ValueError, match="`cu_seqlens_q` must rise from 0 to the number of tokens, 4, got "):
        packed_attention_cpu(*tensors, bad, bad, 4, 4, None, False, *host)


@pytest.mark.parametrize("longest", [3, 64])
def test_bfloat16_training_agrees_on_both_sides_of_its_bounds(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    prefer_forms(monkeypatch, "explicit")
    monkeypatch.setattr(attention_cpu, "BFLOAT16_TRAINING_UP_TO", longest)
    monkeypatch.setattr(attention_cpu, "SCORES_PER_CHUNK", 200)
    segments = ([5, 3, 3, 3, 8], [5, 3, 3, 3, 8])
    tensors = inputs(segments, dtype=torch.bfloat16)
    output = packed_attention(*tensors, *map(boundaries, segments))
    assert_like_oracle(output, tensors, segments, False, 2e-2)


def test_second_derivatives_are_refused_in_bfloat16_training(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_forms(monkeypatch, "explicit")
    tensors, bounds = inputs(([5, 3], [5, 3]), dtype=torch.bfloat16), boundaries([5, 3])
    loss = packed_attention(*tensors, bounds).float().square().sum()
    with pytest.raises(RuntimeError, match="Packed attention in bfloat16 is differentiable once; got `create_graph"):
        torch.autograd.grad(loss, tensors, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_in_bfloat16_training(monkeypatch: pytest.MonkeyPatch, reentrant: bool) -> None:
    prefer_forms(monkeypatch, "explicit")
    tensors, bounds = inputs(([5, 3], [5, 3]), dtype=torch.bfloat16), boundaries([5, 3])
    expected = torch.autograd.grad(packed_attention(*tensors, bounds).float().square().sum(), tensors)
    output = checkpoint(lambda *x: packed_attention(*x, bounds), *tensors, use_reentrant=reentrant)
    output.float().square().sum().backward()
    # Reentrant checkpointing computes the output without gradients, by another kernel.
    torch.testing.assert_close([x.grad for x in tensors], list(expected), rtol=2e-2, atol=2e-2)


def test_second_derivatives_of_the_other_forms() -> None:
    """With a mask, and by PyTorch's unfused kernel, as the documentation says; PyTorch's fused kernel refuses."""
    lengths = [5, 3]
    tensors, bounds = inputs((lengths, lengths), dtype=torch.float32), boundaries(lengths)

    def second(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), tensors)

    module = torch.nn.Module()
    heads = [x.transpose(0, 1)[None] for x in tensors]
    dense, _ = dense_attention_forward(
        module, *heads, None, scaling=tensors[0].shape[-1] ** -0.5, is_causal=False, cu_seq_lens_q=bounds
    )
    with sdpa_kernel(SDPBackend.MATH):
        results = second(dense[0]), second(packed_attention(*tensors, bounds))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="is not implemented"):
        second(packed_attention(*tensors, bounds))
