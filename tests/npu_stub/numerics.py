"""A dispatch mode that computes operations on `npu` tensors of the CANN stub.

Each operation runs twice: in torch_npu, whose checks, shapes, dtypes and choice of device kernels are real, and on the
CPU, whose values are written into the tensors that torch_npu returned. references.py has the CPU form of torch_npu's
own operations. The mode is below autograd, so derivatives are torch_npu's.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tests.npu_stub.attention_references  # noqa: F401 (adds to the table)
from tests.npu_stub.references import REFERENCES

# Operations whose output sizes depend on values, or that read values; torch_npu does not run them.
DATA_DEPENDENT = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::is_nonzero",
    "aten::masked_scatter_backward",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
SYNCHRONIZING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
}
# torch_npu's Meta function and its host code return different shapes where key heads are shared. No kernel here calls
# the operation; `scaled_dot_product_attention` does.
WRONG_META = {"npu::npu_fusion_attention_grad_v3"}


class Numerics(TorchDispatchMode):
    """Compute operations on `npu` tensors on the CPU.

    Attributes:
        log: Names of the operations, in order.
        mismatches: Operations whose shape or dtype on the CPU differs from torch_npu's.
        not_run: Operations that torch_npu rejected, with its message.
        waits: Operations that copy values to the host, which synchronizes with the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.mismatches: list[str] = []
        self.not_run: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if not _involves_npu(args, kwargs) or _returns_view(func):
            return func(*args, **kwargs)
        name = func._schema.name
        self.log.append(name)
        to_host = _copies_to_host(name, args, kwargs)
        if name in SYNCHRONIZING or to_host:
            self.waits.append(name)
        copies = _Copies()
        cpu_args, cpu_kwargs = pytree.tree_map_only(Tensor, copies, (args, kwargs))
        cpu_kwargs = pytree.tree_map_only(torch.device, lambda device: torch.device("cpu"), cpu_kwargs)
        if name.startswith("npu::"):
            expected = REFERENCES[name](**_by_name(func, cpu_args, cpu_kwargs))
        else:
            expected = REFERENCES.get(name, func)(*cpu_args, **cpu_kwargs)
        if to_host:
            return expected
        if name == "aten::_to_copy" and args[0].device.type != "npu":
            return _to_npu(expected)
        found = self._run(func, name, args, kwargs, expected)
        for tensor in _written(func, args, kwargs):
            alias(tensor).copy_(copies(tensor))
        return found

    def _run(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], expected: Any) -> Any:
        """Run the operation in torch_npu, and write the expected values into its outputs."""
        if name in DATA_DEPENDENT:
            if func._schema.is_mutable:
                return args[0]
            return pytree.tree_map_only(Tensor, _to_npu, expected)
        try:
            found = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            self.not_run.append(f"{name}: {str(error).splitlines()[0]}")
            return pytree.tree_map_only(Tensor, _to_npu, expected)
        has_meta = name.startswith("npu::") and name not in WRONG_META
        if has_meta and (planned := _meta_outputs(func, args, kwargs)) != _describe(found):
            self.mismatches.append(
                f"{name}: {planned} by torch_npu's Meta function, {_describe(found)} by its host code"
            )
        given = {id(x) for x in pytree.tree_leaves((args, kwargs))}
        ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
        for one, other in zip(ours, theirs, strict=True):
            if not isinstance(one, Tensor) or id(one) in given:
                continue
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                self.mismatches.append(f"{name}: {_describe(one)} by torch_npu, {_describe(other)} on the CPU")
            alias(one).copy_(other.reshape(one.shape) if one.numel() == other.numel() else other)
        return found


class _Copies:
    """CPU copies of `npu` tensors, one per tensor."""

    def __init__(self) -> None:
        self.of: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "npu":
            return tensor
        if id(tensor) not in self.of:
            self.of[id(tensor)] = _copy_with_strides(alias(tensor))
        return self.of[id(tensor)]


def alias(tensor: Tensor) -> Tensor:
    """Return a CPU tensor that shares the memory of an `npu` tensor."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    size = tensor.element_size()
    flat = whole[: len(whole) // size * size].view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _copy_with_strides(tensor: Tensor) -> Tensor:
    """Copy a tensor with its strides, on which the outputs of some operations depend."""
    if tensor.numel() == 0:
        return tensor.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride())


def _to_npu(tensor: Tensor) -> Tensor:
    """Return a new `npu` tensor with the same values and strides."""
    moved = torch.empty_like(tensor, device="npu")
    alias(moved).copy_(tensor)
    return moved


def _involves_npu(args: Any, kwargs: dict[str, Any]) -> bool:
    leaves = pytree.tree_leaves((args, kwargs))
    devices = [x.device if isinstance(x, Tensor) else x for x in leaves if isinstance(x, Tensor | torch.device)]
    return any(device.type == "npu" for device in devices)


def _copies_to_host(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation copies a tensor to the CPU."""
    if name == "aten::copy_":
        return args[0].device.type == "cpu"
    return name == "aten::_to_copy" and torch.device(kwargs.get("device") or args[0].device).type == "cpu"


def _returns_view(func: Callable[..., Any]) -> bool:
    """Whether an operation returns a view or changes only metadata."""
    schema = func._schema  # type: ignore[attr-defined]
    if schema.name in ("aten::set_", "aten::resize_", "aten::detach_", "aten::record_stream"):
        return True
    infos = [value.alias_info for value in schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the `npu` tensors that an operation changes in place."""
    given = {**{one.name: value for one, value in zip(func._schema.arguments, args, strict=False)}, **kwargs}
    names = [one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    leaves = pytree.tree_leaves([given.get(name) for name in names])
    return [x for x in leaves if isinstance(x, Tensor) and x.device.type == "npu"]


def _by_name(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of an operation's schema by name."""
    arguments = func._schema.arguments
    defaults = {one.name: one.default_value for one in arguments if one.has_default_value()}
    return {**defaults, **{one.name: value for one, value in zip(arguments, args, strict=False)}, **kwargs}


def _meta_outputs(func: Any, args: Any, kwargs: dict[str, Any]) -> list[str]:
    """Describe the outputs of torch_npu's Meta function, which compilation uses."""
    with FakeTensorMode() as mode:
        args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        return _describe(func(*args, **kwargs))


def _describe(results: Any) -> list[str]:
    return [f"{x.dtype} {tuple(x.shape)}" for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
