"""The torch operation `vlparts::packed_attention` and its kernels.

PyTorch's dispatcher picks the kernel. Another package gives a device its own by registering one for
`vlparts::packed_attention` at the device's key and at its Autograd key, for example `PrivateUse1` and
`AutogradPrivateUse1`. Compiled code sees `vlparts::packed_attention_opaque`, which calls the same operation
at run time, so it needs no kernels of its own.
"""

from typing import Any, cast

import torch
from torch import Tensor

from .attention_cpu import packed_attention_cpu
from .attention_reference import packed_attention_reference

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float? scale=None, bool causal=False"
)


def packed_attention_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention inside each segment on CUDA: flash attention where it applies, otherwise the reference.

    Arguments and result are those of `packed_attention_reference`. The contents of the boundaries are not
    checked on the fast path, because that would wait for the device.
    """
    arguments = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if not varlen_applies(query, key, value) or torch.cuda.get_device_capability(query.device) < (8, 0):
        return packed_attention_reference(*arguments, scale, causal)
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, output)  # a tuple only where more is asked for


def varlen_applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's flash attention takes these inputs: half precision, equal head sizes."""
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return False
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and min(query.shape[0], key.shape[0]) > 0
        and all(x.stride(-1) == 1 for x in (query, key, value))
    )


def _opaque(*arguments: Any) -> Tensor:
    return torch.ops.vlparts.packed_attention(*arguments).contiguous()


def _opaque_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _opaque_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _opaque_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.vlparts.packed_attention_opaque_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None, None, None


def _opaque_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    """Recompute the forward pass under autograd, so that every device's own backward kernel is used."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        output = torch.ops.vlparts.packed_attention(*inputs, *settings)
    grads = torch.autograd.grad(output, inputs, grad, allow_unused=True, materialize_grads=True)
    return tuple(x.contiguous() for x in grads)


def _opaque_backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def define_operations() -> None:
    """Define the operations once per process, also where several copies of this file are imported."""
    if hasattr(torch.ops.vlparts, "packed_attention"):
        return
    library = torch.library
    name, opaque = "vlparts::packed_attention", "vlparts::packed_attention_opaque"
    library.define(name, f"({_ARGUMENTS}) -> Tensor")
    library.impl(name, "CompositeImplicitAutograd", packed_attention_reference)
    # A kernel at CPU alone would hide the reference's autograd, so it is registered at both keys.
    library.impl(name, ("CPU", "AutogradCPU"), packed_attention_cpu)
    library.impl(name, ("CUDA", "AutogradCUDA"), packed_attention_cuda)
    library.define(opaque, f"({_ARGUMENTS}) -> Tensor")
    library.impl(opaque, "CompositeExplicitAutograd", _opaque)
    library.register_fake(opaque, _opaque_fake)
    library.define(f"{opaque}_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
    library.impl(f"{opaque}_backward", "CompositeExplicitAutograd", _opaque_backward)
    library.register_fake(f"{opaque}_backward", _opaque_backward_fake)
    library.register_autograd(opaque, _opaque_autograd, setup_context=_opaque_save)
