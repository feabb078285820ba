"""The script that measures the kernels on a card runs on the CANN stub."""

import pytest

from tests.npu_device import measure
from tests.npu_device.measure import REAL_SIZES
from tests.npu_stub.numerics import Numerics
from vlparts_npu.self_check import KERNELS
from vlparts_npu.support import is_joint_projection


def test_there_are_sizes_for_every_kernel() -> None:
    assert REAL_SIZES.keys() == KERNELS.keys()


def test_it_prints_both_tables(
    numerics: Numerics, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"TOKENS": 24, "EXPERT_WIDTH": 32, "EXPERT_INNER": 16, "EXPERT_TOKENS": 12}
    for name, size in small.items():
        monkeypatch.setattr(measure, name, size)
    monkeypatch.setattr(measure, "ROUNDS", 1)
    measure.main([])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| vlparts::rms_norm | ")]
    assert [line.split(" | ")[-1] for line in lines[:3]] == ["within |"] * 3
    assert all(printed.count(f"| {name} | ") >= 4 for name in KERNELS)
    measure.main(["gelu"])
    assert "rms_norm" not in capsys.readouterr().out


def test_real_sizes_are_supported() -> None:
    for name in KERNELS.keys() - {"npu_grouped", "vlparts::swiglu"}:
        assert KERNELS[name].supports(*REAL_SIZES[name]()) is None
    assert is_joint_projection(*REAL_SIZES["vlparts::rotary_pair"]()[:2])
