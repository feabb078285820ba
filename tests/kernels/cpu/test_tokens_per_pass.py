"""The CPU kernel that limits the tokens of a pass."""

import pytest
import torch

from vlparts.kernels.cpu import ACTIVATION_BYTES, tokens_per_pass_cpu
from vlparts.parts.packed_segments import Segments, split_passes

WIDTH = ACTIVATION_BYTES // (4 * 100)  # 100 tokens of float32


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 100), (torch.bfloat16, 200), (torch.float64, 50)])
def test_activations_of_a_pass_take_a_fixed_number_of_bytes(dtype: torch.dtype, tokens: int) -> None:
    assert tokens_per_pass_cpu(torch.zeros(1, 2, dtype=dtype), WIDTH) == tokens
    assert torch.ops.vlparts.tokens_per_pass(torch.zeros(1, 2, dtype=dtype), WIDTH) == tokens


def test_a_pass_has_at_least_one_token() -> None:
    assert tokens_per_pass_cpu(torch.zeros(1, 2), 10**9) == 1


def test_a_long_sequence_is_divided() -> None:
    segments = Segments(torch.tensor([0, 60, 100, 130], dtype=torch.int32), 60)
    passes = split_passes(segments, torch.zeros(130, 2), WIDTH)
    assert [one.tokens for one in passes] == [100, 30]
    assert [one.mlp_chunk_size for one in passes] == [100, 100]
