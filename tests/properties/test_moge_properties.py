"""Properties of a block of grouped experts, for any sizes."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.parts.test_moge import block_in_loops, block_of, config_of
from torch import Tensor


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a configuration: groups, their experts and choices, and the router's options."""
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return {
        "num_expert_groups": groups,
        "num_experts": groups * size,
        "num_experts_per_tok": groups * draw(st.integers(1, size)),
        "hidden_size": draw(st.sampled_from([4, 8, 20])),
        "moe_intermediate_size": draw(st.integers(1, 5)),
        "shared_expert_intermediate_size": draw(st.integers(0, 3)),
        "renormalize": draw(st.booleans()),
        "router_scale": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


def hidden(tokens: int, fields: dict[str, Any]) -> Tensor:
    return torch.randn(1, tokens, fields["hidden_size"], dtype=torch.float64)


@given(blocks(), st.integers(1, 7))
def test_any_block_equals_loops(fields: dict[str, Any], tokens: int) -> None:
    block, inputs = block_of(**fields), hidden(tokens, fields)
    torch.testing.assert_close(block(inputs), block_in_loops(block, config_of(**fields), inputs))


@given(blocks(), st.integers(0, 7), st.data())
def test_a_token_does_not_depend_on_the_others(fields: dict[str, Any], tokens: int, data: st.DataObject) -> None:
    block, inputs = block_of(**fields), hidden(tokens, fields)
    order = data.draw(st.lists(st.integers(0, tokens - 1), max_size=5)) if tokens else []
    torch.testing.assert_close(block(inputs)[:, order], block(inputs[:, order]))


@given(blocks(), st.integers(1, 7), st.data())
def test_padding_gets_no_routed_experts_and_changes_nothing(
    fields: dict[str, Any], tokens: int, data: st.DataObject
) -> None:
    block, inputs = block_of(**fields), hidden(tokens, fields)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    outputs = block(inputs, mask)
    torch.testing.assert_close(outputs[:, mask], block(inputs)[:, mask])
    shared = torch.zeros_like(inputs) if block.shared_expert is None else block.shared_expert(inputs)
    assert torch.equal(outputs[:, ~mask], shared[:, ~mask])
