"""Loads backends: packages of kernels for one kind of hardware, registered for the operations of `vlparts`.

The backends "cpu" and "cuda" are built in (`vlparts.kernels`). Others are entry points of the group
`vlparts.backends` that name a function without arguments, which registers the backend's kernels. Its module may also
have a function `check_kernels` without arguments, which compares the kernels with their references and returns a dict
from kernel name to error, "" without one. A backend that fails never breaks `import vlparts`; `vlparts info` shows the
reason.
"""

import importlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

ENTRY_POINT_GROUP = "vlparts.backends"
ENVIRONMENT_VARIABLE = "VLPARTS_BACKENDS"

BUILT_IN = tuple(
    importlib.metadata.EntryPoint(name, f"vlparts.kernels.{name}:register", ENTRY_POINT_GROUP)
    for name in ("cpu", "cuda")
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackendStatus:
    """Status of one backend.

    Attributes:
        name: Name of the entry point, for example `npu`.
        active: Whether its register function returned without an error.
        reason: Why it is not active; empty for an active backend.
    """

    name: str
    active: bool
    reason: str = ""


_statuses: dict[str, BackendStatus] = {}


def load_backends() -> dict[str, BackendStatus]:
    """Register every installed backend that the environment variable `VLPARTS_BACKENDS` allows.

    If the variable is unset, all are loaded; if it is empty or `none`, none. Otherwise it is a comma-separated list of
    names. A backend that is already active is not registered again.

    Returns:
        The status of each installed or requested backend, by name, in alphabetical order.
    """
    requested = _requested_backends()
    installed = {point.name: point for point in _entry_points()}
    statuses = {}
    for name in sorted(installed.keys() | (requested or set())):
        if name in _statuses and _statuses[name].active:
            statuses[name] = _statuses[name]
        elif requested is not None and name not in requested:
            statuses[name] = BackendStatus(name, False, f"switched off by {ENVIRONMENT_VARIABLE}")
        elif name not in installed:
            known = ", ".join(sorted(installed)) or "none"
            reason = f"{ENVIRONMENT_VARIABLE} names it, but it is not installed (installed: {known})"
            statuses[name] = BackendStatus(name, False, reason)
        else:
            statuses[name] = _register(installed[name])
    _statuses.clear()
    _statuses.update(statuses)
    return dict(statuses)


def backend_status() -> dict[str, BackendStatus]:
    """Return the result of the last `load_backends`, without loading anything."""
    return dict(_statuses)


def check_backends() -> dict[str, dict[str, str]]:
    """Compare the kernels of every active backend with their references, if it has `check_kernels`.

    Returns:
        By backend name, the error of each kernel; empty without one.
    """
    errors = {}
    for point in _entry_points():
        if point.name in _statuses and _statuses[point.name].active:
            check = getattr(importlib.import_module(point.module), "check_kernels", None)
            if check is not None:
                errors[point.name] = check()
    return dict(sorted(errors.items()))


def _entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    yield from BUILT_IN
    yield from importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)


def _requested_backends() -> set[str] | None:
    """Return the names in the environment variable, or None if it is unset."""
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    if value is None:
        return None
    names = {name.strip() for name in value.split(",") if name.strip()}
    return set() if names == {"none"} else names


def _register(point: importlib.metadata.EntryPoint) -> BackendStatus:
    """Load one backend's register function and call it."""
    try:
        point.load()()
    except (Exception, SystemExit) as error:  # a vendor's package may raise anything while it is imported
        # A missing package is the usual case of a backend that is not needed; other errors are unexpected.
        level = logging.DEBUG if isinstance(error, ModuleNotFoundError) else logging.WARNING
        reason = f"{type(error).__name__}: {error}"
        logger.log(level, "The backend %r is not active: %s", point.name, reason)
        return BackendStatus(point.name, False, reason)
    return BackendStatus(point.name, True)
