"""Passes of a layer: whole segments, in order, none lost; one pass without a kernel that limits them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlparts.parts import packed_segments
from vlparts.parts.packed_segments import Pass, Segments, split_passes

LIMIT = 100


def split(
    lengths: list[int], with_rotary: bool = False, with_host_lengths: bool = True
) -> tuple[Segments, list[Pass]]:
    """Segments of the given lengths, and their passes of at most 100 tokens."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = sum(lengths)
    rotary = (torch.rand(total, 4), torch.rand(total, 4)) if with_rotary else None
    cu_seqlens_cpu = cu_seqlens.tolist() if with_host_lengths else None
    segments = Segments(cu_seqlens, max(lengths), cu_seqlens_cpu, rotary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_segments, "tokens_per_pass", lambda hidden_states, width: LIMIT)
        return segments, split_passes(segments, torch.zeros(total, 2), 8)


@given(st.lists(st.integers(0, 260), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_passes_cover_the_sequence(lengths: list[int], with_rotary: bool, with_host_lengths: bool) -> None:
    segments, passes = split(lengths, with_rotary, with_host_lengths)
    if sum(lengths) <= LIMIT:
        assert passes == [Pass(segments)]
        return
    parts = [one.segments for one in passes]
    assert [length for part in parts for length in part.cu_seqlens.diff().tolist()] == lengths
    for one, part in zip(passes, parts, strict=True):
        own = part.cu_seqlens.diff()
        assert part.cu_seqlens[0] == 0
        assert part.cu_seqlens.dtype == torch.int32
        assert part.cu_seqlens_cpu == part.cu_seqlens.tolist()
        assert part.max_seqlen == own.max()
        assert one.tokens == own.sum()
        assert one.mlp_chunk_size == LIMIT
        assert one.tokens <= LIMIT or (own > 0).sum() == 1
    if with_rotary:
        for index in (0, 1):
            assert torch.equal(torch.cat([part.rotary[index] for part in parts]), segments.rotary[index])
    else:
        assert all(part.rotary is None for part in parts)


def test_without_a_kernel_all_tokens_are_one_pass() -> None:
    segments = Segments(torch.tensor([0, 500, 1000], dtype=torch.int32), 500)
    assert split_passes(segments, torch.zeros(1000, 2, device="meta"), 10**9) == [Pass(segments)]


def test_compiled_programs_have_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    segments = Segments(torch.tensor([0, 500, 1000], dtype=torch.int32), 500)
    assert split_passes(segments, torch.zeros(1000, 2), 10**9) == [Pass(segments)]
