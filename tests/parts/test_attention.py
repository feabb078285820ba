"""Packed attention against a dense block mask, its life under autograd, autocast, compile and other devices."""

import importlib.util
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vlparts.parts import attention_cpu
from vlparts.parts.attention import packed_attention
from vlparts.parts.attention_ops import packed_attention_cuda, varlen_applies
from vlparts.parts.attention_reference import packed_attention_reference

# Lengths of queries and keys of each segment.
SEGMENTS: dict[str, tuple[list[int], list[int]]] = {
    "self": ([5, 3, 8], [5, 3, 8]),
    "one token": ([1, 4, 1], [1, 4, 1]),
    "equal neighbours": ([4, 4, 4], [4, 4, 4]),
    "equal apart": ([4, 2, 4, 2, 3], [4, 2, 4, 2, 3]),
    "empty": ([0, 3, 0, 2, 0], [0, 3, 0, 2, 0]),
    "pooling": ([1, 1, 1], [7, 2, 5]),
    "cross": ([2, 5, 3], [4, 1, 3]),
    "no keys": ([2, 3, 1], [4, 0, 2]),
    "no queries": ([2, 0, 1], [4, 3, 2]),
    "long": ([131, 7, 131], [131, 7, 131]),
}
cases = pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
flags = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(
    segments: tuple[list[int], list[int]],
    heads: int = 4,
    key_heads: int = 4,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [
        (sum(segments[0]), heads, 8),
        (sum(segments[1]), key_heads, 8),
        (sum(segments[1]), key_heads, 8),
    ]
    query, key, value = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return query, key, value


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    causal: bool = False,
) -> Tensor:
    """Dense attention in float64 over a mask that loops fill in pair by pair."""
    seen = torch.zeros(sum(lengths_q), sum(lengths_k), dtype=torch.bool)
    start_q = start_k = 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        for i in range(length_q):
            for j in range(length_k):
                seen[start_q + i, start_k + j] = not causal or length_q - i <= length_k - j
        start_q, start_k = start_q + length_q, start_k + length_k
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    blind = ~seen.any(1)
    weights = scores.masked_fill(~(seen | blind[:, None]), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights.masked_fill(blind[:, None], 0.0), value)


def assert_like_oracle(
    output: Tensor,
    tensors: tuple[Tensor, ...],
    segments: tuple[list[int], list[int]],
    causal: bool,
    tolerance: float,
) -> None:
    """Compare the output and the gradients of a random projection."""
    expected = oracle(*tensors, *segments, causal)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad((output.double() * direction).sum(), tensors)
    references = torch.autograd.grad((expected * direction).sum(), tensors)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=4 * tolerance)


@cases
@flags
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_output_and_gradients_are_those_of_dense_attention(
    segments: tuple[list[int], list[int]], causal: bool, key_heads: int
) -> None:
    tensors = inputs(segments, key_heads=key_heads)
    output = packed_attention(*tensors, *map(boundaries, segments), causal=causal)
    assert output.is_contiguous()
    assert_like_oracle(output, tensors, segments, causal, 1e-10)


@cases
@flags
def test_the_reference_agrees(segments: tuple[list[int], list[int]], causal: bool) -> None:
    tensors = inputs(segments, key_heads=2)
    output = packed_attention_reference(*tensors, *map(boundaries, segments), 0, 0, causal=causal)
    assert_like_oracle(output, tensors, segments, causal, 1e-10)


@cases
@flags
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=str
)
def test_every_type(segments: tuple[list[int], list[int]], causal: bool, dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(segments, dtype=dtype)
    output = packed_attention(*tensors, *map(boundaries, segments), causal=causal)
    assert output.dtype == dtype
    assert_like_oracle(output, tensors, segments, causal, tolerance)


@pytest.mark.parametrize("longest", [3, 64])
def test_bfloat16_training_agrees_on_both_sides_of_its_bounds(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    monkeypatch.setattr(attention_cpu, "BFLOAT16_TRAINING_UP_TO", longest)
    monkeypatch.setattr(attention_cpu, "SCORES_AT_A_TIME", 200)
    segments = ([5, 3, 3, 3, 8], [5, 3, 3, 3, 8])
    tensors = inputs(segments, dtype=torch.bfloat16)
    output = packed_attention(*tensors, *map(boundaries, segments))
    assert_like_oracle(output, tensors, segments, False, 2e-2)


@pytest.mark.usefixtures("poisoned_empty")
@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_unwritten_memory_is_read(segments: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    tensors = inputs(segments, dtype=dtype)
    output = packed_attention(*tensors, *map(boundaries, segments))
    output.sum().backward()
    assert output.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)


def test_values_may_have_another_width_and_scale_is_used() -> None:
    query, key, value = torch.randn(5, 2, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 3)
    cu_seqlens = boundaries([2, 3])
    output = packed_attention(query, key, value, cu_seqlens, scale=0.3)
    expected = oracle(query * 0.3 * 8**0.5, key, value, [2, 3], [2, 3])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_is_used_in_training(dtype: torch.dtype) -> None:
    tensors = inputs(([4, 3], [4, 3]), dtype=dtype)
    output = packed_attention(*tensors, boundaries([4, 3]), scale=0.1)
    scaled = (tensors[0].double() * 0.1 * 8**0.5, *tensors[1:])
    expected = oracle(*scaled, [4, 3], [4, 3])
    got, wanted = (torch.autograd.grad(x.double().square().sum(), tensors) for x in (output, expected))
    torch.testing.assert_close(got, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(("queries", "keys"), [([], []), ([0], [0]), ([0, 0], [0, 3]), ([2], [0])])
def test_nothing_to_attend_to(queries: list[int], keys: list[int]) -> None:
    tensors = inputs((queries, keys))
    output = packed_attention(*tensors, boundaries(queries), boundaries(keys))
    assert output.shape == (sum(queries), 4, 8)
    assert output.tolist() == torch.zeros_like(output).tolist()
    (gradient,) = torch.autograd.grad(output.sum(), tensors[:1])
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_no_gradient_crosses_segments(dtype: torch.dtype) -> None:
    lengths = [4, 3, 4, 200]
    tensors = inputs((lengths, lengths), dtype=dtype)
    cu_seqlens = boundaries(lengths)
    output = packed_attention(*tensors, cu_seqlens)
    for start, end in pairwise(cu_seqlens.tolist()):
        for gradient in torch.autograd.grad(output[start:end].sum(), tensors, retain_graph=True):
            assert gradient[:start].count_nonzero() == 0
            assert gradient[end:].count_nonzero() == 0
        (gradient,) = torch.autograd.grad(output[start:end].square().sum(), tensors[2:], retain_graph=True)
        assert gradient[start:end].count_nonzero() > 0


def test_poison_stays_in_its_segment() -> None:
    tensors = [x.detach() for x in inputs(([3, 4, 3], [3, 4, 3]))]
    clean = packed_attention(*tensors, boundaries([3, 4, 3]))
    for tensor in tensors:
        tensor[3:7] = float("nan")
    poisoned = packed_attention(*tensors, boundaries([3, 4, 3]))
    assert torch.equal(poisoned[:3], clean[:3])
    assert torch.equal(poisoned[7:], clean[7:])
    assert poisoned[3:7].isnan().all()


@flags
def test_gradcheck(causal: bool) -> None:
    segments = ([2, 0, 3, 1], [2, 1, 3, 2])
    tensors = tuple(torch.randn(n, 1, 2, dtype=torch.float64, requires_grad=True) for n in (6, 8, 8))
    assert torch.autograd.gradcheck(
        lambda *x: packed_attention(*x, *map(boundaries, segments), causal=causal), tensors
    )


def test_inference_mode_and_no_grad() -> None:
    tensors = inputs(([3, 5], [3, 5]))
    expected = packed_attention(*tensors, boundaries([3, 5]))
    with torch.no_grad():
        assert torch.equal(packed_attention(*tensors, boundaries([3, 5])), expected)
    with torch.inference_mode():
        assert torch.equal(packed_attention(*tensors, boundaries([3, 5])), expected)


def test_autocast_brings_mixed_types_together() -> None:
    query, key, value = inputs(([3, 5], [3, 5]), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = packed_attention(query, key, value.bfloat16(), boundaries([3, 5]))
    assert output.dtype == torch.bfloat16
    rounded = packed_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), boundaries([3, 5]))
    assert torch.equal(output, rounded)


# --- bad input


def test_tensors_that_do_not_fit_are_refused() -> None:
    q, k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    cu = boundaries([4])
    with pytest.raises(ValueError, match=r"key must have shape \(tokens, heads, channels\), got \(1, 4, 2, 8\)"):
        packed_attention(q, k[None], v, cu)
    with pytest.raises(ValueError, match="one floating-point type .*for value, torch.float64"):
        packed_attention(q, k, v.double(), cu)
    with pytest.raises(ValueError, match="one floating-point type .*torch.int64"):
        packed_attention(q.long(), k.long(), v.long(), cu)
    with pytest.raises(ValueError, match="one device, got torch.float32 on cpu and, for key, torch.float32 on meta"):
        packed_attention(q, k.to("meta"), v, cu)
    with pytest.raises(ValueError, match=r"key and value must have equally many tokens .*\(4, 2, 8\) and \(3, 2, 8\)"):
        packed_attention(q, k, v[:3], cu)
    with pytest.raises(ValueError, match="equally many channels per head, got 8 and 7"):
        packed_attention(q, k[..., :7], v, cu)
    with pytest.raises(ValueError, match="the heads of key must divide the heads of query, got 2 and 3"):
        packed_attention(torch.randn(4, 3, 8), k, v, cu)
    with pytest.raises(ValueError, match="the heads of key must divide the heads of query, got 0 and 2"):
        packed_attention(q, k[:, :0], v[:, :0], cu)


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([0, 4]),
        torch.tensor([0.0, 4.0]),
        torch.tensor([[0, 4]], dtype=torch.int32),
        boundaries([4])[:0],
    ],
    ids=["int64", "float", "two dimensions", "nothing"],
)
def test_boundaries_are_a_row_of_int32(bad: Tensor) -> None:
    tensors = inputs(([4], [4]))
    with pytest.raises(ValueError, match=r"cu_seqlens_q must be an int32 tensor of shape \(segments \+ 1,\), got "):
        packed_attention(*tensors, bad)
    with pytest.raises(ValueError, match="cu_seqlens_k must be an int32 tensor"):
        packed_attention(*tensors, boundaries([4]), bad)


@pytest.mark.parametrize("bounds", [[0, 2], [1, 4], [0, 5], [0, 3, 2, 4]])
def test_boundaries_must_cover_the_tokens(bounds: list[int]) -> None:
    tensors = inputs(([4], [4]))
    bad = torch.tensor(bounds, dtype=torch.int32)
    good = boundaries([0] * (len(bounds) - 2) + [4])
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to the number of tokens, 4, got "):
        packed_attention(*tensors, bad, good)
    with pytest.raises(ValueError, match="cu_seqlens_k must rise from 0 to the number of tokens, 4, got "):
        packed_attention(*tensors, good, bad)


def test_boundaries_must_agree() -> None:
    tensors = inputs(([4], [4]))
    with pytest.raises(ValueError, match="equally many segments, got 1 and 2"):
        packed_attention(*tensors, boundaries([4]), boundaries([2, 2]))
    with pytest.raises(ValueError, match="cu_seqlens_q must be on cpu like query, got meta"):
        packed_attention(*tensors, boundaries([4]).to("meta"))


# --- compile and other devices


def layer(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int | None) -> Tensor:
    return packed_attention(query * 2, key, value, cu_q, cu_k, max_seqlen_q=longest, max_seqlen_k=longest).sin()


@pytest.mark.parametrize("longest", [8, None])
def test_compiled_whole_forward_and_backward(longest: int | None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for name in ("self", "cross", "empty", "no keys"):
            segments = SEGMENTS[name]
            tensors = inputs(segments, key_heads=2)
            cu_q, cu_k = map(boundaries, segments)
            results = [run(*tensors, cu_q, cu_k, longest) for run in (layer, compiled)]
            torch.testing.assert_close(results[1], results[0])
            gradients = [torch.autograd.grad(result.square().sum(), tensors) for result in results]
            torch.testing.assert_close(gradients[1], gradients[0])


def test_other_contents_of_the_boundaries_do_not_recompile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first, second = boundaries([5, 3, 8]), boundaries([1, 11, 4])
    tensors = inputs(([16], [16]))
    compiled(*tensors, first, first, 11)
    with torch._dynamo.config.patch(error_on_recompile=True):
        output = compiled(*tensors, second, second, 11)
    torch.testing.assert_close(output, layer(*tensors, second, second, 11))


def test_export_keeps_one_node() -> None:
    class Layer(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
            return packed_attention(query, key, value, cu_seqlens, max_seqlen_q=5)

    tensors = [x.detach() for x in inputs(([5, 3], [5, 3]))]
    program = torch.export.export(Layer(), (*tensors, boundaries([5, 3])))
    other = boundaries([1, 7])
    torch.testing.assert_close(program.module()(*tensors, other), packed_attention(*tensors, other))


def test_the_opaque_operation_is_sound() -> None:
    cu_q, cu_k = map(boundaries, SEGMENTS["cross"])
    arguments = (*inputs(SEGMENTS["cross"]), cu_q, cu_k, 5, 4, None, False)
    torch.library.opcheck(torch.ops.vlparts.packed_attention_opaque.default, arguments)


def second_copy() -> ModuleType:
    """The source file of the operations under another module name, as remote code brings it."""
    path = Path(sys.modules["vlparts.parts.attention"].__file__ or "")
    spec = importlib.util.spec_from_file_location("vlparts.parts.attention_copy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("error")
def test_a_second_copy_of_the_file_works_beside_the_first() -> None:
    copy = second_copy()
    assert copy.packed_attention is not packed_attention
    tensors = inputs(SEGMENTS["self"])
    cu_seqlens = boundaries(SEGMENTS["self"][0])
    assert torch.equal(copy.packed_attention(*tensors, cu_seqlens), packed_attention(*tensors, cu_seqlens))
    del copy
    assert packed_attention(*tensors, cu_seqlens).isfinite().all()


def test_another_package_takes_over_a_device_by_registration_alone() -> None:
    """A tensor subclass without kernels of its own stands for the device. It runs in a process of its own because
    registrations are for ever."""
    program = """
        import torch
        from vlparts.parts.attention import packed_attention

        calls = []

        def kernel(key):
            def attend(query, *arguments):
                calls.append((key, len(arguments), *arguments[4:]))
                return query

            return attend

        class Device(torch.Tensor):
            @staticmethod
            def __new__(cls, data):
                return torch.Tensor._make_wrapper_subclass(
                    cls, data.shape, dtype=data.dtype, device="privateuseone"
                )

            @classmethod
            def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
                raise AssertionError(f"{function} reached the device")

        library = torch.library.Library("vlparts", "IMPL")
        for key in ("PrivateUse1", "AutogradPrivateUse1"):
            library.impl("packed_attention", kernel(key), key)

        cu_seqlens = Device(torch.tensor([0, 2, 5], dtype=torch.int32))
        query, key, value = (Device(torch.randn(5, 2, 8)) for _ in range(3))
        options = dict(max_seqlen_q=3, max_seqlen_k=4, scale=0.5, causal=True)
        assert packed_attention(query, key, value, cu_seqlens, **options) is query
        with torch.inference_mode(), torch._C._DisableTorchDispatch():
            assert packed_attention(query, key, value, cu_seqlens, **options) is query
        settings = (8, 3, 4, 0.5, True)
        assert calls == [("AutogradPrivateUse1", *settings), ("PrivateUse1", *settings)], calls

        plain = torch.randn(5, 2, 8)
        packed_attention(plain, plain, plain, torch.tensor([0, 2, 5], dtype=torch.int32))
        assert len(calls) == 2, calls
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_kernels_stand_at_their_keys() -> None:
    for key in ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA", "CompositeImplicitAutograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("vlparts::packed_attention", key), key


def test_flash_attention_is_asked_only_for_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """On meta tensors: the call is accepted, and the result has the right shape."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    query, key, value = (
        torch.empty(n, h, 64, dtype=torch.float16, device="meta") for n, h in ((6, 4), (9, 2), (9, 2))
    )
    cu_q, cu_k = boundaries([1, 5]).to("meta"), boundaries([4, 5]).to("meta")
    output = packed_attention_cuda(query, key, value, cu_q, cu_k, 5, 5, 0.5, True)
    assert output.shape == query.shape
    assert output.dtype == torch.float16


def test_the_cuda_kernel_turns_to_the_reference_for_the_rest() -> None:
    segments = SEGMENTS["cross"]
    tensors = inputs(segments)
    output = packed_attention_cuda(*tensors, *map(boundaries, segments), 5, 4)
    assert_like_oracle(output, tensors, segments, False, 1e-10)
