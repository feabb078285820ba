"""Ascend NPU kernels for the operations of `vlparts`.

Nothing is imported here before `register` is called, so that the package can be installed on any machine.
"""

__all__ = ["register"]


def register() -> None:
    """Register the kernels of this package with PyTorch's dispatcher and transformers' registries.

    Called by `vlparts.backends.load_backends`. This version brings no kernels: every operation of `vlparts`
    runs its reference on the NPU. Kernels come later, one file per operation.

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
