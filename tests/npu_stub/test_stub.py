"""The CANN stub: its device, torch_npu's schemas, and the command that checks the kernels."""

import pytest
import torch
from typer.testing import CliRunner

import vlparts.registration  # noqa: F401 (loads the backends)
from tests.npu.schema_lines import committed
from tests.npu_stub.cann import Cann
from tests.npu_stub.numerics import Numerics
from vlparts.backends import BackendStatus, backend_status
from vlparts.cli import main as command_line
from vlparts_npu.self_check import KERNELS, check_all, check_kernel, reset_checks


def test_the_backend_is_active() -> None:
    assert torch.npu.is_available()
    assert backend_status()["npu"] == BackendStatus("npu", True)


def test_the_committed_schemas_equal_those_of_torch_npu() -> None:
    for line in committed(".".join(torch.__version__.split(".")[:2])):
        schema = torch._C.parse_schema(f"npu::{line}")
        packet = getattr(torch.ops.npu, schema.name.removeprefix("npu::"))
        assert str(getattr(packet, schema.overload_name or "default")._schema) == str(schema)


def test_memory_is_host_memory_and_kernels_compute_nothing(cann: Cann) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    moved = tensor.to("npu")
    assert torch.equal(moved.cpu(), tensor)
    torch.npu.empty_cache()
    assert not torch.equal((moved + 1).cpu(), tensor + 1)
    assert cann.counts()["aclnnAdd"] + cann.counts()["aclnnAdds"] == 1


@pytest.mark.parametrize("name", [None, "aten::add"])
def test_numerics_computes_values(name: str | None, numerics: Numerics) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).to("npu")
    column = tensor.t()[1]  # not contiguous, and not at the start
    column += 10
    assert tensor.cpu()[:, 1].tolist() == [11.0, 15.0, 19.0]
    assert torch.nonzero(tensor > 10).cpu().tolist() == torch.nonzero(tensor.cpu() > 10).tolist()
    assert name is None or any(one.startswith(name) for one in numerics.log)
    assert numerics.mismatches == []
    assert numerics.not_run == []


def test_kernels_that_compute_nothing_fail_their_check() -> None:
    """Uninitialized memory must not pass, as on a card whose operations are wrong."""
    torch.npu.empty_cache()
    assert all(check_kernel(kernel, "npu") for kernel in KERNELS.values())


def test_the_command_checks_every_kernel(numerics: Numerics, monkeypatch: pytest.MonkeyPatch) -> None:
    reset_checks()
    monkeypatch.setattr(command_line.console, "width", 500)
    result = CliRunner().invoke(command_line.app, ["info", "--self-check"])
    assert result.exit_code == 0
    assert result.output.count("passed") == len(KERNELS) == len(check_all("npu"))
