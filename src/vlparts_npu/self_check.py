"""Registration of kernels, and their comparison with references before they are trusted.

Operations of accelerators have returned wrong results in the field without an error. Each kernel is therefore compared
with its reference, values and gradients, once per process: at its first use, or by `vlparts info --self-check`. A
kernel that fails is switched off with one warning, and the reference runs instead.
"""

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .comparison import Arguments, Tolerance, copy_arguments, find_difference, values_and_gradients

logger = logging.getLogger(__name__)

DEVICE_TYPE = "npu"
DISPATCH_KEYS = ("PrivateUse1", "AutogradPrivateUse1")


@dataclass(frozen=True)
class Kernel:
    """A device kernel and its reference.

    Attributes:
        name: Name of the operation or implementation, for example `vlparts::rms_norm`.
        run: The kernel. It is called only with arguments that `supports` accepts.
        reference: The same computation in plain PyTorch, on any device and in float64.
        make_inputs: Returns small tuples of arguments on the CPU, all of them supported, from its own generator.
            Gradients are compared for floating-point tensors that require them and for the parameters of modules.
        supports: Takes the same arguments; returns why the kernel does not support them, or None if it does.
        tolerance: Largest error relative to the largest magnitude of the reference's tensor; one number, or one per
            dtype of the kernel's result.
        complete: Takes a call's arguments and returns those for `supports`, `run` and `reference`; None to pass them
            on unchanged.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[], Sequence[Arguments]]
    supports: Callable[..., str | None]
    tolerance: Tolerance
    complete: Callable[..., Arguments] | None = None


class CallRecord(NamedTuple):
    """One call of a kernel: its name, and why the reference ran instead; empty if the kernel ran."""

    name: str
    reason: str


KERNELS: dict[str, Kernel] = {}
# The last calls, for tests and for the table of launches.
CALL_LOG: deque[CallRecord] = deque(maxlen=10_000)

# By kernel name: why its check failed, empty if it passed; no entry before its check.
_errors: dict[str, str] = {}
_locks: dict[str, threading.Lock] = {}


def register_operation(kernel: Kernel) -> None:
    """Register a kernel with the dispatcher for the operation of its name, once per process.

    Both keys get the same function: at the Autograd key, the torch_npu operations that it calls build the graph; at
    the first key alone, the kernel would return tensors without gradients.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key(kernel.name, DISPATCH_KEYS[1]):
        torch.library.impl(kernel.name, DISPATCH_KEYS, with_fallback(kernel))


def with_fallback(kernel: Kernel) -> Callable[..., Any]:
    """Add a kernel to `KERNELS`, and return the implementation to register.

    The implementation runs the kernel if it supports the arguments and passed its check, otherwise the reference.
    """
    KERNELS[kernel.name] = kernel
    _errors.pop(kernel.name, None)
    _locks[kernel.name] = threading.Lock()

    @functools.wraps(kernel.reference)
    def implementation(*arguments: Any, **options: Any) -> Any:
        tensor = next(x for x in (*arguments, *options.values()) if isinstance(x, Tensor))
        if tensor.device.type != DEVICE_TYPE:  # transformers' registries call an implementation on every device
            reason = f"the tensors are on {tensor.device.type}"
        else:
            if kernel.complete is not None:
                arguments, options = kernel.complete(*arguments, **options), {}
            reason = kernel.supports(*arguments, **options) or _check_at_first_use(kernel, tensor)
        CALL_LOG.append(CallRecord(kernel.name, reason))
        return (kernel.reference if reason else kernel.run)(*arguments, **options)

    return implementation


def check_all(device: torch.device | str) -> dict[str, str]:
    """Check all kernels again.

    Args:
        device: Device on which the kernels run.

    Returns:
        By kernel name, why the check failed; an empty string if it passed.
    """
    return {kernel.name: _check_and_record(kernel, torch.device(device)) for kernel in list(KERNELS.values())}


def reset_checks() -> None:
    """Discard the results of all checks and the log of calls, so that each kernel is checked at its next use."""
    _errors.clear()
    CALL_LOG.clear()


def check_kernel(kernel: Kernel, device: torch.device | str) -> str:
    """Compare a kernel with its reference, values and gradients, on `kernel.make_inputs()`.

    The reference runs on the CPU in float64, on the same values. Modes of the caller, such as autocast and inference
    mode, do not apply.

    Returns:
        Why the check failed; an empty string if it passed.
    """
    no_autocast = torch.autocast(torch.device(device).type, enabled=False)
    case = "inputs"
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), no_autocast:
        try:
            for index, arguments in enumerate(kernel.make_inputs()):
                case = f"case {index}"
                error = _check_case(kernel, arguments, device)
                if error:
                    return f"{case}: {error}"
        except Exception as error:  # a driver may raise anything, and the reference must run then
            return f"{case}: {type(error).__name__}: {error}"
    return ""


def _check_case(kernel: Kernel, arguments: Arguments, device: torch.device | str) -> str:
    reason = kernel.supports(*arguments)
    if reason is not None:
        return f"the kernel does not support its own inputs: {reason}"
    found = values_and_gradients(kernel.run, copy_arguments(arguments, device=device))
    expected = values_and_gradients(kernel.reference, copy_arguments(arguments, dtype=torch.float64))
    return find_difference(found, expected, kernel.tolerance)


def _check_at_first_use(kernel: Kernel, tensor: Tensor) -> str:
    """Check a kernel unless it was checked before; return why it must not run on the tensor, empty if it may."""
    name = kernel.name
    if name not in _errors:
        if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
            return "not checked yet, and the tensors hold no data to check it with"
        # The lock is held where this call comes from the check itself or from another thread during it. Waiting could
        # deadlock, since autograd computes gradients in other threads.
        if not _locks[name].acquire(blocking=False):
            return "being checked"
        try:
            if name not in _errors:
                _check_and_record(kernel, tensor.device)
        finally:
            _locks[name].release()
    return _errors[name] and f"switched off: {_errors[name]}"


def _check_and_record(kernel: Kernel, device: torch.device) -> str:
    """Check a kernel, keep the result, and warn of an error that is new."""
    error = check_kernel(kernel, device)
    if error and error != _errors.get(kernel.name):
        logger.warning("The kernel of %s failed its check and is switched off (%s)", kernel.name, error)
    _errors[kernel.name] = error
    return error
