"""An environment without vlparts, shared by all tests of this folder."""

from pathlib import Path

import pytest

from vlparts.demo.isolation import environment_without


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_without(tmp_path_factory.mktemp("bare") / "environment")
