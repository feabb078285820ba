"""transformers' own test mixins, from its source distribution, which the nox session `upstream` unpacks.

They are imported as the package `transformers_tests`. What the source distribution does not hold (tests of generation
and export, objects of the Hub) is replaced by empty modules.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.tiny import picture

PACKAGE = "transformers_tests"


class ExportTesterMixin:
    """Replaces the mixin of export tests; tests/parts/test_export.py exports our models."""


class GenerationTesterMixin:
    """Replaces the mixin of generation tests; the tests of each part generate."""


def load(name: str) -> Any:
    """Import a module of transformers' tests.

    Args:
        name: Name of the file without ending, for example "test_modeling_common".
    """
    if PACKAGE not in sys.modules:
        add_module(PACKAGE, __path__=[os.environ["VLPARTS_UPSTREAM_TESTS"]])
        add_module(f"{PACKAGE}.exporters", __path__=[])
        add_module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
        add_module(f"{PACKAGE}.generation", __path__=[])
        add_module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
        add_module("fetch_hub_objects_for_ci", url_to_local_path=local_picture)
    return importlib.import_module(f"{PACKAGE}.{name}")


def local_picture(url: str) -> str:
    """Return the file of a picture in place of one of the Hub."""
    path = Path(tempfile.gettempdir()) / "vlparts-upstream.png"
    if not path.exists():
        picture(60, 40).save(path)
    return str(path)


def add_module(name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
