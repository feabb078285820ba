"""Applies the table of tests that cannot hold: a listed test must fail, and each row must match a test."""

from collections.abc import Generator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from tests.upstream.exceptions import EXCEPTIONS

MARKERS = (
    "accelerate_tests",
    "torch_compile_test",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if item.path.parent == Path(__file__).parent]  # not those of the default run
    if not own:
        return
    unused = dict.fromkeys(EXCEPTIONS)
    for item in own:
        name = "::".join(item.nodeid.split("::")[1:])
        for pattern, reason in EXCEPTIONS.items():
            if fnmatchcase(name, pattern):
                unused.pop(pattern, None)
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
                break
    narrowed = config.option.keyword or any("::" in argument for argument in config.args)
    if unused and not narrowed and len({item.path for item in own}) > 1:
        raise pytest.UsageError(f"No test matches these rows of tests/upstream/exceptions.py: {', '.join(unused)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    report = yield
    is_listed = item.get_closest_marker("xfail") is not None
    if is_listed and call.when == "call" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = "[XFAIL(strict)] the test is listed in tests/upstream/exceptions.py, but skipped"
    return report
