"""Registration of the parts with transformers, at the moment that transformers is imported.

Importing `vlparts` loads neither torch nor transformers. If transformers is imported already, the parts are registered
at once; otherwise a finder on `sys.meta_path` registers them right after transformers' own import.
"""

import importlib
import sys
import traceback
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_transformers() -> None:
    """Register the parts now, or as soon as transformers is imported."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _TransformersFinder())


def _register() -> None:
    import_frameworks()
    importlib.import_module("vlparts.registration")


class _TransformersFinder(MetaPathFinder, Loader):
    """Finds and loads transformers as the other finders do, and registers the parts afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()


def import_frameworks() -> None:
    """Import torch and transformers' model classes.

    Raises:
        ImportError: If torch_npu is installed but cannot be imported. Other errors are not changed.
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
    """Return the error, of a chain of errors, that was raised while `package` was imported."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # A function of the package in the traceback does not make the package the cause.
            name = str(frame.f_globals.get("__name__", ""))
            if frame.f_code.co_name == "<module>" and name.partition(".")[0] == package:
                return error
        error = error.__cause__ or error.__context__
    return None
