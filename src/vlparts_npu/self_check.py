"""Kernels with their references, and the check of one against the other before a kernel is trusted.

Operations of accelerators have returned wrong results in the field without an error. So each kernel is compared with
its reference, values and gradients, once per process: at its first use, or by `vlparts info --self-check`. A kernel
that fails is switched off with one warning, and the reference is used from then on.
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


@dataclass(frozen=True)
class Kernel:
    """A device kernel and what it has to agree with.

    Attributes:
        name: Name of the operation or implementation, for example `vlparts::rms_norm`.
        run: The kernel. It is called only with arguments that `supports` accepts.
        reference: The same in plain PyTorch, which runs on every device and in float64.
        make_inputs: Returns small argument tuples on the CPU, from a generator of its own; every one of them must be
            supported. Gradients are compared for floating-point tensors that require them and for the parameters of
            modules.
        supports: Takes the same arguments; returns why they are not for the kernel, or None.
        tolerance: Largest error, relative to the largest magnitude of the reference's tensor. One number for every
            type, or a number for each type of the kernel's result.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[], Sequence[Arguments]]
    supports: Callable[..., str | None]
    tolerance: Tolerance


class Use(NamedTuple):
    """One call: the kernel's name, and why the reference was used; empty where the kernel ran."""

    name: str
    reason: str


DEVICE_TYPE = "npu"

KERNELS: dict[str, Kernel] = {}
# The last calls, for tests and for the tables of the documentation.
USES: deque[Use] = deque(maxlen=10_000)

_results: dict[str, str] = {}
_locks: dict[str, threading.Lock] = {}


def guarded(kernel: Kernel) -> Callable[..., Any]:
    """Add the kernel to `KERNELS`, and return the implementation to register for its operation.

    The implementation runs the kernel where it supports the arguments and has passed its check, and otherwise the
    reference.
    """
    KERNELS[kernel.name] = kernel
    _results.pop(kernel.name, None)
    _locks[kernel.name] = threading.Lock()

    @functools.wraps(kernel.reference)
    def implementation(*arguments: Any, **options: Any) -> Any:
        # Transformers' registries call an implementation on every device.
        tensor = next(x for x in (*arguments, *options.values()) if isinstance(x, Tensor))
        reason = None if tensor.device.type == DEVICE_TYPE else f"the tensors are on {tensor.device.type}"
        reason = reason or kernel.supports(*arguments, **options) or _reason_not_trusted(kernel, tensor)
        USES.append(Use(kernel.name, reason))
        return (kernel.reference if reason else kernel.run)(*arguments, **options)

    return implementation


def check_all(device: torch.device | str) -> dict[str, str]:
    """Check every kernel again.

    Args:
        device: Where the kernels run.

    Returns:
        For each kernel why it failed; empty where it passed.
    """
    return {kernel.name: _check_and_note(kernel, torch.device(device)) for kernel in list(KERNELS.values())}


def forget_results() -> None:
    """Let every kernel be checked again at its next use, and empty the list of uses."""
    _results.clear()
    USES.clear()


def find_fault(kernel: Kernel, device: torch.device | str) -> str:
    """Compare a kernel with its reference, values and gradients, on its own small inputs.

    The reference runs on the CPU in float64, on the same numbers, whatever modes the caller is in.

    Returns:
        What is wrong; empty for nothing.
    """
    plain = torch.autocast(torch.device(device).type, enabled=False)
    where = "inputs"
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), plain:
        try:
            for case, arguments in enumerate(kernel.make_inputs()):
                where = f"case {case}"
                fault = _find_fault_in(kernel, arguments, device)
                if fault:
                    return f"{where}: {fault}"
        except Exception as error:  # whatever a driver raises, the reference must take over
            return f"{where}: {type(error).__name__}: {error}"
    return ""


def _find_fault_in(kernel: Kernel, arguments: Arguments, device: torch.device | str) -> str:
    reason = kernel.supports(*arguments)
    if reason is not None:
        return f"its own inputs are not supported: {reason}"
    found = values_and_gradients(kernel.run, copy_arguments(arguments, device=device))
    expected = values_and_gradients(kernel.reference, copy_arguments(arguments, dtype=torch.float64))
    return find_difference(found, expected, kernel.tolerance)


def _reason_not_trusted(kernel: Kernel, tensor: Tensor) -> str:
    """Why a kernel must not run on such tensors, after its check at the first use; empty if it may."""
    name = kernel.name
    if name not in _results:
        if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
            return "not checked yet, and nothing can be checked without data"
        # Who finds the lock taken is inside the check, or beside it. To wait could block forever, because gradients
        # are computed in other threads.
        if not _locks[name].acquire(blocking=False):
            return "being checked"
        try:
            if name not in _results:
                _check_and_note(kernel, tensor.device)
        finally:
            _locks[name].release()
    return _results[name] and f"switched off: {_results[name]}"


def _check_and_note(kernel: Kernel, device: torch.device) -> str:
    """Check a kernel, keep the result, and warn if it is bad news."""
    fault = find_fault(kernel, device)
    if fault and fault != _results.get(kernel.name):
        logger.warning("The kernel of %s failed its check and is switched off (%s)", kernel.name, fault)
    _results[kernel.name] = fault
    return fault
