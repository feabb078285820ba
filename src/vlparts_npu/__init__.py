"""Ascend NPU kernels for the operations of `vlparts`.

Nothing is imported here before a function is called, so that the package can be installed on any machine.
"""

__all__ = ["check_kernels", "register"]

# Files of this package with kernels, and the function of each that registers them.
KERNEL_FILES = {
    "attention": "register_attention",
    "norm": "register_norm",
    "activations": "register_activations",
    "rotary": "register_rotary",
    "experts": "register_experts",
}


def register() -> None:
    """Register the kernels of this package with PyTorch's dispatcher and transformers' registries.

    Called by `vlparts.backends.load_backends`. What a kernel does not support runs the reference on the NPU.

    Raises:
        ModuleNotFoundError: torch_npu is not installed.
        ImportError: torch_npu is installed but cannot be imported, for example where CANN is missing.
    """
    import importlib
    import importlib.util

    if importlib.util.find_spec("torch_npu") is None:
        raise ModuleNotFoundError(
            "torch_npu is not installed; on a machine with an Ascend NPU, run `pip install vlparts[npu]`",
            name="torch_npu",
        )
    try:
        importlib.import_module("torch_npu")
    except Exception as error:
        raise ImportError(
            f"torch_npu is installed but cannot be imported ({type(error).__name__}: {error}); "
            "check that CANN is installed and that its set_env.sh was sourced"
        ) from error
    register_kernels()


def register_kernels() -> None:
    """Register the kernels of every file, with torch_npu imported before."""
    import importlib

    for name, function in KERNEL_FILES.items():
        getattr(importlib.import_module(f"{__name__}.{name}"), function)()


def check_kernels() -> dict[str, str]:
    """Compare every registered kernel with its reference on the NPU, for `vlparts info --self-check`.

    A kernel that fails is switched off.

    Returns:
        For each kernel what is wrong with it; empty for nothing.
    """
    from .self_check import check_all

    return check_all("npu")
