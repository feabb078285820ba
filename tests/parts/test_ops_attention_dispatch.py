"""The torch operations of packed attention: compile, export, copies of the file, kernels of other packages."""

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.parts.attention_oracle import SEGMENTS, boundaries, inputs
from vlparts.parts.ops_attention import packed_attention


def layer(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int | None, causal: bool = False
) -> Tensor:
    output = packed_attention(
        query * 2,
        key,
        value,
        cu_q,
        cu_k,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        scale=0.3,
        causal=causal,
    )
    return output.sin()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("longest", [8, None])
def test_compiled_whole_forward_and_backward(longest: int | None, causal: bool) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for name in ("self", "cross", "empty", "no keys"):
        segments = SEGMENTS[name]
        tensors = inputs(segments, key_heads=2)
        cu_q, cu_k = map(boundaries, segments)
        results = [run(*tensors, cu_q, cu_k, longest, causal) for run in (layer, compiled)]
        torch.testing.assert_close(results[1], results[0])
        gradients = [torch.autograd.grad(result.square().sum(), tensors) for result in results]
        torch.testing.assert_close(gradients[1], gradients[0])


def test_second_derivatives_of_compiled_programs_are_refused() -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    tensors, bounds = inputs(([5, 3], [5, 3])), boundaries([5, 3])
    with pytest.raises(RuntimeError, match="Compiled packed attention is differentiable once; got `create_graph"):
        torch.autograd.grad(compiled(*tensors, bounds, bounds, 5).square().sum(), tensors, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradient_checkpointing_of_compiled_programs(backend: str, reentrant: bool) -> None:
    tensors, bounds = inputs(([5, 3], [5, 3]), dtype=torch.bfloat16), boundaries([5, 3])
    expected = torch.autograd.grad(layer(*tensors, bounds, bounds, 5).float().square().sum(), tensors)
    inner = torch.compile(layer, backend=backend)

    def run(*given: Tensor) -> Tensor:
        return checkpoint(lambda *x: inner(*x, bounds, bounds, 5), *given, use_reentrant=reentrant)

    found = [torch.autograd.grad(run(*tensors).float().square().sum(), tensors)] if not reentrant else []
    run(*tensors).float().square().sum().backward()
    found.append(tuple(x.grad for x in tensors))
    for gradients in found:
        torch.testing.assert_close(gradients, expected, rtol=2e-2, atol=2e-2)


def test_other_contents_of_the_boundaries_do_not_recompile() -> None:
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
    torch.library.opcheck(torch.ops.vlparts.varlen_attention_opaque.default, arguments)


def second_copy() -> ModuleType:
    """Load the source file of the operations under another module name, as remote code does."""
    path = Path(sys.modules["vlparts.parts.ops_attention"].__file__ or "")
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
    """The device is a tensor subclass without kernels. Runs in another process, since registrations are permanent."""
    program = """
        import torch
        from vlparts.parts.ops_attention import packed_attention

        calls = []

        def kernel(key):
            def attend(query, *arguments):
                calls.append((key, len(arguments), *arguments[4:8], *map(list, arguments[8:])))
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
            library.impl("varlen_attention", kernel(key), key)

        cu_seqlens = Device(torch.tensor([0, 2, 5], dtype=torch.int32))
        query, key, value = (Device(torch.randn(5, 2, 8)) for _ in range(3))
        options = dict(max_seqlen_q=3, max_seqlen_k=4, scale=0.5, causal=True, cu_seqlens_q_cpu=[0, 2, 5])
        assert packed_attention(query, key, value, cu_seqlens, **options) is query
        with torch.inference_mode(), torch._C._DisableTorchDispatch():
            assert packed_attention(query, key, value, cu_seqlens, **options) is query
        settings = (10, 3, 4, 0.5, True, [0, 2, 5], [0, 2, 5])
        assert calls == [("AutogradPrivateUse1", *settings), ("PrivateUse1", *settings)], calls

        plain = torch.randn(5, 2, 8)
        packed_attention(plain, plain, plain, torch.tensor([0, 2, 5], dtype=torch.int32))
        assert len(calls) == 2, calls
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
