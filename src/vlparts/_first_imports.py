"""The first import of torch and transformers: a broken torch_npu is named in one line.

Both import torch_npu wherever it is installed, and die deep inside of it where CANN is missing.
"""

import importlib
import traceback


def import_frameworks() -> None:
    """Import torch and transformers' models.

    Raises:
        ImportError: torch_npu is installed but cannot be imported. Any other error is left as it is.
    """
    try:
        importlib.import_module("transformers.modeling_utils")
    except Exception as error:
        cause = _error_inside("torch_npu", error)
        if cause is None:
            raise
        raise ImportError(
            f"torch_npu is installed but cannot be imported ({type(cause).__name__}: {cause}), which torch and "
            "transformers try. Check that CANN is installed and its set_env.sh sourced, or uninstall torch-npu.",
            name="torch_npu",
        ) from error


def _error_inside(package: str, error: BaseException | None) -> BaseException | None:
    """Of an error and those that it was raised from, the one that came while a package was imported."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # Later functions of a package may stand in a traceback without being at fault.
            name = str(frame.f_globals.get("__name__", ""))
            if frame.f_code.co_name == "<module>" and name.partition(".")[0] == package:
                return error
        error = error.__cause__ or error.__context__
    return None


import_frameworks()
