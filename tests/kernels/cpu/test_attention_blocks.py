"""Attention in blocks against dense float64, on every processor, and the conditions of its use."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cpu.forms import prefer_forms
from tests.parts.attention_oracle import SEGMENTS, assert_like_oracle, boundaries, flags, inputs, oracle
from vlparts.kernels.cpu import attention as attention_cpu
from vlparts.kernels.cpu import attention_blocks
from vlparts.kernels.cpu import linear as linear_cpu
from vlparts.kernels.cpu.attention_blocks import attend_in_blocks, blocks_apply
from vlparts.parts.ops_attention import packed_attention
from vlparts.parts.ops_attention_reference import attend

LENGTHS = ([20, 9, 20, 33], [20, 12, 20, 8])
MANY = [LENGTHS, *(SEGMENTS[name] for name in ("self", "equal neighbours", "empty", "pooling", "no keys", "cross"))]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def computed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[tuple[int, ...]]:
    """Use small blocks for all supported inputs; returns the shapes of the queries."""
    shapes = []

    def noted(query: Tensor, *arguments: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return attend_in_blocks(query, *arguments)

    monkeypatch.setattr(attention_cpu, "attend_in_blocks", noted)
    monkeypatch.setattr(attention_cpu, "BFLOAT16_TRAINING_UP_TO", 0)
    prefer_forms(monkeypatch, "explicit", "blocks", "onednn")
    monkeypatch.setattr(attention_blocks, "has_onednn", lambda: True)
    monkeypatch.setattr(attention_blocks, "MIN_LENGTH", 1)
    torch.set_num_threads(request.param)
    monkeypatch.setattr(attention_blocks, "SCORES_PER_BLOCK", 200)
    monkeypatch.setattr(attention_blocks, "LENGTH_MULTIPLE", 4)
    if not torch.backends.mkldnn.is_available():
        monkeypatch.setattr(attention_blocks, "product", F.linear)
    return shapes


types = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=str)
in_blocks = pytest.mark.usefixtures("computed")


def small(dtype: torch.dtype = torch.float32, key_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return inputs(LENGTHS, key_heads=key_heads, dtype=dtype)


def attention(tensors: tuple[Tensor, ...], **options: Any) -> Tensor:
    return packed_attention(*tensors, *map(boundaries, LENGTHS), **options)


@in_blocks
@pytest.mark.parametrize("segments", MANY, ids=str)
@types
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_output_and_gradients_are_those_of_dense_attention(
    segments: tuple[list[int], list[int]], key_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    tensors = inputs(segments, key_heads=key_heads, dtype=dtype)
    output = packed_attention(*tensors, *map(boundaries, segments))
    assert output.dtype == dtype
    assert_like_oracle(output, tensors, segments, False, tolerance)


@types
@pytest.mark.parametrize("scores", [1, 64, 10**6])
@pytest.mark.parametrize("steps", [1, 4, 32])
def test_any_blocks(
    computed: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    scores: int,
    steps: int,
) -> None:
    monkeypatch.setattr(attention_blocks, "SCORES_PER_BLOCK", scores)
    monkeypatch.setattr(attention_blocks, "LENGTH_MULTIPLE", steps)
    tensors = small(dtype)
    assert_like_oracle(attention(tensors), tensors, LENGTHS, False, tolerance)
    assert [shape[2] for shape in computed] == [20, 9, 33]


@in_blocks
@pytest.mark.usefixtures("poisoned_empty")
@types
def test_no_unwritten_memory_is_read(dtype: torch.dtype, tolerance: float) -> None:
    tensors = small(dtype)
    assert_like_oracle(attention(tensors), tensors, LENGTHS, False, tolerance)


@in_blocks
@types
def test_values_may_have_another_width_and_scale_is_used(dtype: torch.dtype, tolerance: float) -> None:
    query, key, value = small(dtype)
    tensors = (query, key, torch.randn(60, 4, 3).to(dtype).requires_grad_())
    scaled = (query.double() * 0.3 * 8**0.5, *tensors[1:])
    output, expected = attention(tensors, scale=0.3), oracle(*scaled, *LENGTHS)
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    mine, theirs = (torch.autograd.grad(x.double().square().sum(), tensors) for x in (output, expected))
    torch.testing.assert_close(mine, theirs, rtol=2 * tolerance, atol=4 * tolerance)


@in_blocks
@types
def test_segments_are_apart(dtype: torch.dtype, tolerance: float) -> None:
    tensors = small(dtype)
    clean = attention(tensors)
    (gradient,) = torch.autograd.grad(clean[20:29].square().sum(), tensors[2:])
    assert gradient[:20].count_nonzero() == gradient[32:].count_nonzero() == 0
    assert gradient[20:32].count_nonzero() > 0
    poisoned = [x.detach().clone() for x in tensors]
    for tensor, rows in zip(poisoned, (slice(20, 29), slice(20, 32), slice(20, 32)), strict=True):
        tensor[rows] = float("nan")
    output = attention(tuple(poisoned))
    assert torch.equal(output[:20], clean[:20])
    assert torch.equal(output[29:], clean[29:])
    assert output[20:29].isnan().all()


@in_blocks
@types
def test_without_gradients_it_is_the_same(dtype: torch.dtype, tolerance: float) -> None:
    tensors = small(dtype)
    expected = attention(tensors)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(attention(tensors), expected)


@in_blocks
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone(wanted: int) -> None:
    tensors = small()
    expected = torch.autograd.grad(attention(tensors).square().sum(), tensors)[wanted]
    alone = [x.detach() for x in tensors]
    alone[wanted].requires_grad_()
    (gradient,) = torch.autograd.grad(attention(tuple(alone)).square().sum(), alone[wanted])
    torch.testing.assert_close(gradient, expected)


@in_blocks
def test_second_derivatives_are_refused() -> None:
    tensors = small()
    with pytest.raises(RuntimeError, match="Packed attention in blocks is differentiable once; got `create_graph"):
        torch.autograd.grad(attention(tensors).square().sum(), tensors[0], create_graph=True)


@in_blocks
@types
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(dtype: torch.dtype, tolerance: float, reentrant: bool) -> None:
    tensors = small(dtype)
    expected = torch.autograd.grad(attention(tensors).float().square().sum(), tensors)
    checkpoint(lambda *x: attention(x), *tensors, use_reentrant=reentrant).float().square().sum().backward()
    assert all(torch.equal(x.grad, gradient) for x, gradient in zip(tensors, expected, strict=True))


@in_blocks
@types
def test_weights_are_not_kept(dtype: torch.dtype, tolerance: float) -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        attend_in_blocks(*(torch.randn(1, 2, 50, 8, dtype=dtype, requires_grad=True) for _ in range(3)), None)
    assert [x.numel() for x in kept] == [2 * 50 * 8] * 4


# --- rounding


@in_blocks
@pytest.mark.parametrize(
    ("change", "factor"),
    [
        (lambda q, k: (q, k), 1.2),
        (lambda q, k: (q, k + 10 * torch.randn(1, 2, 1, 64)), 1.2),
        (lambda q, k: (4 * q, k), 1.5),
        (lambda q, k: (F.layer_norm(q, (64,)), F.layer_norm(k, (64,))), 1.2),
    ],
    ids=["order one", "keys with much in common", "scores up to 20", "normalised"],
)
def test_bfloat16_is_about_as_exact_as_fused_attention(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], factor: float
) -> None:
    query, key, value = torch.randn(3, 1, 2, 256, 64).unbind()
    query, key, value = (x.bfloat16() for x in (*change(query, key), value))
    scores = query.double() @ key.double().transpose(-1, -2) / 8
    expected = scores.softmax(-1) @ value.double()
    errors = [
        (output.double() - expected).square().mean().sqrt()
        for output in (attend_in_blocks(query, key, value, None), attend(query, key, value, None, False))
    ]
    assert 0 < errors[0] < factor * errors[1]


@in_blocks
def test_bfloat16_gradients_are_about_as_exact_as_those_of_fused_attention() -> None:
    tensors = [torch.randn(1, 2, 256, 64).bfloat16().requires_grad_() for _ in range(3)]
    direction = torch.randn(1, 2, 256, 64)

    def gradients(attention: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*inputs), inputs, direction.to(inputs[0].dtype))

    precise = [x.detach().double().requires_grad_() for x in tensors]
    expected = gradients(lambda q, k, v: (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v, precise)
    mine = gradients(lambda *x: attend_in_blocks(*x, None), tensors)
    fused = gradients(lambda *x: attend(*x, None, False), tensors)
    for ours, theirs, exact in zip(mine, fused, expected, strict=True):
        errors = [(x.double() - exact).square().mean().sqrt() for x in (ours, theirs)]
        assert 0 < errors[0] < 1.6 * errors[1]


# --- choice


def test_few_shapes_occur(computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None, multiply: Any = linear_cpu.product) -> Tensor:
        shapes.add((*x.shape, *weight.shape))
        return multiply(x, weight, bias)

    monkeypatch.setattr(attention_blocks, "product", noted)
    monkeypatch.setattr(attention_blocks, "LENGTH_MULTIPLE", 32)
    monkeypatch.setattr(attention_blocks, "SCORES_PER_BLOCK", 10**6)
    for length in range(33, 65, 4):
        tensors = inputs(([length], [length]), dtype=torch.float32)
        packed_attention(*tensors, boundaries([length])).sum().backward()
    assert len(computed) == 8
    assert shapes == {(64, 8, 64, 8), (64, 64, 8, 64), (64, 9, 64, 9), (8, 64, 64, 64)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_types_are_not_computed_in_blocks(computed: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    attention(small(dtype))
    assert computed == []


@flags
def test_causal_attention_is_not_computed_in_blocks(computed: list[tuple[int, ...]], causal: bool) -> None:
    tensors = small()
    output = attention(tensors, causal=causal)
    assert (computed == []) == causal
    assert_like_oracle(output, tensors, LENGTHS, causal, 2e-5)


def test_short_bfloat16_training_keeps_its_weights(
    computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "BFLOAT16_TRAINING_UP_TO", 20)
    tensors = small(torch.bfloat16)
    attention(tensors)
    assert [shape[2] for shape in computed] == [33]
    with torch.no_grad():
        attention(tensors)
    assert [shape[2] for shape in computed[1:]] == [20, 9, 33]


@in_blocks
def test_blocks_are_not_used_under_dispatch_modes_and_tangents() -> None:
    """Also where oneDNN is disabled."""
    query = torch.randn(1, 2, 40, 8)
    assert blocks_apply(query, query, query)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not blocks_apply(query, query, query)
    with FlopCounterMode(display=False):
        assert not blocks_apply(query, query, query)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        assert not blocks_apply(dual, query, query)
        assert not blocks_apply(query, query, dual)


def test_only_where_every_thread_has_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "has_onednn", lambda: True)
    torch.set_num_threads(1)

    def apply(length_q: int, length_k: int) -> bool:
        query, key = torch.zeros(1, 2, length_q, 64), torch.zeros(1, 2, length_k, 64)
        return blocks_apply(query, key, key)

    assert apply(256, 256)
    assert not apply(255, 256)
    assert not apply(1, 200_000)
    torch.set_num_threads(2)
    assert apply(512, 512)
    torch.set_num_threads(3)  # one of them would have no head
    assert not apply(512, 512)
    torch.set_num_threads(1)
    monkeypatch.setattr(attention_blocks, "has_onednn", lambda: False)
    assert not apply(4096, 4096)
