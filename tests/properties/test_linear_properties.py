"""Properties of linear layers of any size."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.cpu.forms import prefer_forms

from vlparts.kernels.cpu import linear as linear_cpu

counts = st.integers(0, 40) | st.sampled_from([64, 129, 200])
widths = st.integers(1, 70)
orders = st.permutations(["onednn", "weight_first"])


@given(counts, widths, widths, st.booleans(), st.booleans(), st.integers(1, 70), orders)
def test_every_form_gives_what_float64_gives(
    rows: int, features: int, outputs: int, turned: bool, bias: bool, rows_at_a_time: int, forms: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        prefer_forms(patch, *forms)
        patch.setattr(linear_cpu, "ROW_MULTIPLE", 16)
        patch.setattr(linear_cpu, "ROWS_PER_CHUNK", rows_at_a_time)
        x = torch.randn(features, rows).t() if turned else torch.randn(rows, features)
        tensors = [x.requires_grad_(), torch.randn(outputs, features).requires_grad_()]
        tensors += [torch.randn(outputs).requires_grad_()] * bias
        output = torch.ops.vlparts.linear(*tensors)
        direction = torch.randn_like(output)
        gradients = torch.autograd.grad((output * direction).sum(), tensors)
    precise = [y.detach().double().requires_grad_() for y in tensors]
    expected = F.linear(*precise)
    torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=1e-5)
    exact = torch.autograd.grad((expected * direction.double()).sum(), precise)
    for mine, theirs in zip(gradients, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=1e-5)


@given(st.integers(1, 30), st.integers(1, 30), widths, widths, orders)
def test_rows_are_independent(first: int, second: int, features: int, outputs: int, forms: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        prefer_forms(patch, *forms)
        x, weight = torch.randn(first + second, features), torch.randn(outputs, features)
        together = torch.ops.vlparts.linear(x, weight)
        apart = [torch.ops.vlparts.linear(part, weight) for part in x.split((first, second))]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-5)
