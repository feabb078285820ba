"""Loading of backends: kernels for one kind of hardware, registered for the operations of `vlparts`.

The backends "cpu" and "cuda" are built in (`vlparts.kernels`). Others are entry points of the group
`vlparts.backends` that name a function without arguments, which registers the backend's kernels. Its module may also
have a function `check_kernels` without arguments, which compares the kernels with their references and returns a dict
from kernel to what is wrong with it, "" for nothing. A backend that fails never breaks `import vlparts`: the reason is
kept, and `vlparts info` shows it.
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
    """What became of one backend.

    Attributes:
        name: The entry point's name, for example `npu`.
        active: Whether its register function returned without an error.
        reason: Why it is not active; empty for an active backend.
    """

    name: str
    active: bool
    reason: str = ""


_statuses: dict[str, BackendStatus] = {}


def load_backends() -> dict[str, BackendStatus]:
    """Register every installed backend that the environment variable `VLPARTS_BACKENDS` allows.

    Unset, the variable allows all. Empty or `none` switches all off. Otherwise it is a comma-separated list
    of the names to load. A backend that is already active is not registered a second time.

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
    """Return what the last `load_backends` found, by backend name, without loading anything."""
    return dict(_statuses)


def check_backends() -> dict[str, dict[str, str]]:
    """Let every active backend that can compare its kernels with their references.

    Returns:
        By backend name, for each kernel what is wrong with it; empty for nothing.
    """
    faults = {}
    for point in _entry_points():
        if point.name in _statuses and _statuses[point.name].active:
            check = getattr(importlib.import_module(point.module), "check_kernels", None)
            if check is not None:
                faults[point.name] = check()
    return dict(sorted(faults.items()))


def _entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    yield from BUILT_IN
    yield from importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)


def _requested_backends() -> set[str] | None:
    """Return the names that the environment asks for, or None where it does not limit them."""
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
        # A missing package is the usual case of a backend that is not wanted; anything else is news.
        level = logging.DEBUG if isinstance(error, ModuleNotFoundError) else logging.WARNING
        reason = f"{type(error).__name__}: {error}"
        logger.log(level, "The backend %r is not active: %s", point.name, reason)
        return BackendStatus(point.name, False, reason)
    return BackendStatus(point.name, True)
