"""Ascend NPU kernels for the operations of `vlparts`.

Importing this package loads neither torch nor torch_npu, so that it can be installed on any machine.
"""

__all__ = ["check_kernels", "register"]

# Modules of this package that hold kernels, and the function of each that registers them.
KERNEL_MODULES = {
    "attention": "register_attention",
    "rms_norm": "register_rms_norm",
    "activations": "register_activations",
    "rotary": "register_rotary",
    "experts": "register_experts",
}


def register() -> None:
    """Register the kernels with PyTorch's dispatcher and transformers' registries.

    `vlparts.backends.load_backends` calls it through an entry point. Arguments that a kernel does not support run the
    operation's reference on the NPU.

    Raises:
        ModuleNotFoundError: If torch_npu is not installed.
        ImportError: If torch_npu is installed but cannot be imported, for example because CANN is missing.
    """
    import importlib
    import importlib.util

    if importlib.util.find_spec("torch_npu") is None:
        raise ModuleNotFoundError(
            "torch_npu is not installed. On a machine with an Ascend NPU, run `pip install vlparts[npu]`.",
            name="torch_npu",
        )
    try:
        importlib.import_module("torch_npu")
    except Exception as error:
        raise ImportError(
            f"torch_npu is installed but cannot be imported ({type(error).__name__}: {error}). "
            "Check that CANN is installed and its set_env.sh sourced.",
            name="torch_npu",
        ) from error
    # Loads all backends, this one included. Imported by a kernel module, it would find that module half imported.
    importlib.import_module("vlparts.registration")
    register_kernels()


def register_kernels() -> None:
    """Register the kernels of all modules; torch_npu must have been imported."""
    import importlib

    for name, function in KERNEL_MODULES.items():
        getattr(importlib.import_module(f"{__name__}.{name}"), function)()


def check_kernels() -> dict[str, str]:
    """Compare all registered kernels with their references on the NPU, for `vlparts info --self-check`.

    A kernel that fails is switched off.

    Returns:
        By kernel name, why the check failed; an empty string if it passed.
    """
    from .self_check import check_all

    return check_all("npu")
