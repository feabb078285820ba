"""Backends are found by entry point, may be switched off, and never break the import."""

import importlib.metadata
import os
import subprocess
import sys
import types

import pytest

from vlparts import backends
from vlparts.backends import BackendStatus, backend_status, check_backends, load_backends

calls: list[str] = []


def register_good() -> None:
    calls.append("good")


def register_broken() -> None:
    raise RuntimeError("the driver is too old")


def register_exiting() -> None:
    sys.exit("no device")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install four backends: a good one, one that raises, one that exits, one whose module is missing."""
    module = types.ModuleType("house_backends")
    vars(module).update(good=register_good, broken=register_broken, exiting=register_exiting)
    monkeypatch.setitem(sys.modules, "house_backends", module)
    group = backends.ENTRY_POINT_GROUP
    points = [
        importlib.metadata.EntryPoint("good", "house_backends:good", group),
        importlib.metadata.EntryPoint("broken", "house_backends:broken", group),
        importlib.metadata.EntryPoint("exiting", "house_backends:exiting", group),
        importlib.metadata.EntryPoint("absent", "house_no_such_module:register", group),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    monkeypatch.setattr(backends, "BUILT_IN", ())
    monkeypatch.setattr(backends, "_statuses", {})
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    calls.clear()


def test_a_failing_backend_is_recorded_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    statuses = load_backends()
    assert list(statuses) == ["absent", "broken", "exiting", "good"]
    assert statuses["good"] == BackendStatus("good", True)
    assert statuses["broken"] == BackendStatus("broken", False, "RuntimeError: the driver is too old")
    assert statuses["exiting"] == BackendStatus("exiting", False, "SystemExit: no device")
    assert statuses["absent"].reason == "ModuleNotFoundError: No module named 'house_no_such_module'"
    warned = " ".join(record.message for record in caplog.records)
    assert "'broken' is not active: RuntimeError: the driver is too old" in warned
    assert "absent" not in warned


def test_status_is_that_of_the_last_load() -> None:
    assert backend_status() == {}
    statuses = load_backends()
    assert backend_status() == statuses
    assert backend_status() is not statuses


def test_an_active_backend_is_registered_once() -> None:
    load_backends()
    load_backends()
    assert calls == ["good"]


@pytest.mark.parametrize("value", ["", "none", " none ", ","])
def test_the_environment_switches_all_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, value)
    statuses = load_backends()
    assert not any(status.active for status in statuses.values())
    assert {status.reason for status in statuses.values()} == {"switched off by VLPARTS_BACKENDS"}
    assert calls == []


def test_the_environment_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "good, unheard-of")
    statuses = load_backends()
    assert [name for name, status in statuses.items() if status.active] == ["good"]
    assert statuses["broken"].reason == "switched off by VLPARTS_BACKENDS"
    assert statuses["unheard-of"].reason == (
        "VLPARTS_BACKENDS names it, but it is not installed (installed: absent, broken, exiting, good)"
    )


def test_only_active_backends_that_can_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["house_backends"]
    monkeypatch.setattr(module, "check_kernels", lambda: {"norm": "", "attention": "off by 2"}, raising=False)
    assert check_backends() == {}
    load_backends()
    assert check_backends() == {"good": {"norm": "", "attention": "off by 2"}}
    monkeypatch.delattr(module, "check_kernels")
    assert check_backends() == {}


def test_npu_says_that_torch_npu_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import vlparts_npu

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="torch_npu is not installed"):
        vlparts_npu.register()


def test_npu_says_why_torch_npu_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    import vlparts_npu

    def fail(name: str) -> None:
        raise OSError("libascendcl.so: cannot open shared object file")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(ImportError, match="cannot be imported .OSError: libascendcl.so"):
        vlparts_npu.register()


KERNELS = """
import os, torch
import vlparts.parts.ops_attention  # which imports transformers, so that all is registered
from vlparts.backends import backend_status
name = "vlparts::linear"
print({one.name: one.active for one in backend_status().values()}["cpu"],
      torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"))
"""


@pytest.mark.parametrize(("value", "active"), [(None, True), ("none", False), ("cpu", True), ("cuda", False)])
def test_the_environment_switches_the_kernels_for_cpu(value: str | None, active: bool) -> None:
    environment = {name: text for name, text in os.environ.items() if name != backends.ENVIRONMENT_VARIABLE}
    if value is not None:
        environment[backends.ENVIRONMENT_VARIABLE] = value
    run = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True, timeout=240)
    assert run.stdout.split() == [str(active)] * 2, run.stderr
