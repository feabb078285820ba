"""A layer's passes: whole segments, in order, none lost."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vlparts.parts.packed_segments import CPU_ACTIVATION_BYTES, Segments, split_passes

WIDTH = CPU_ACTIVATION_BYTES // (4 * 100)  # 100 tokens of float32 at a time


@given(st.lists(st.integers(0, 260), min_size=1, max_size=12), st.booleans())
def test_passes_cover_the_sequence(lengths: list[int], rotated: bool) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = sum(lengths)
    rotary = (torch.rand(total, 4), torch.rand(total, 4)) if rotated else None
    hidden_states = torch.zeros(total, 2)
    passes = split_passes(Segments(cu_seqlens, max(lengths), rotary), hidden_states, WIDTH)
    if total <= 100:
        assert len(passes) == 1
    assert all(one.rows == (100 if total > 100 else 0) for one in passes)
    assert [n for one in passes for n in one.cu_seqlens.diff().tolist()] == lengths
    assert all(one.cu_seqlens[0] == 0 and one.cu_seqlens.dtype == torch.int32 for one in passes)
    assert all(one.cu_seqlens[-1] <= 100 or (one.cu_seqlens.diff() > 0).sum() == 1 for one in passes)
    if len(passes) > 1:
        assert [one.tokens for one in passes] == [int(one.cu_seqlens[-1]) for one in passes]
        assert [one.max_seqlen for one in passes] == [int(one.cu_seqlens.diff().max()) for one in passes]
    if rotated:
        assert torch.equal(torch.cat([one.rotary[0] for one in passes]), rotary[0])
        assert torch.equal(torch.cat([one.rotary[1] for one in passes]), rotary[1])


def test_other_devices_take_all_at_once() -> None:
    segments = Segments(torch.tensor([0, 500, 1000], dtype=torch.int32), 500)
    assert split_passes(segments, torch.zeros(1000, 2, device="meta"), WIDTH) == [segments]
