"""Numbers of tokens that are left follow from the grids alone; every token is kept, merged or dropped."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlparts import VisionTokenReducer

GRIDS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4)
RATIOS = st.sampled_from([1.0, 0.99, 0.5, 0.25, 1 / 3, 0.1, 0.01])
CHOOSING = ("merge_similar", "prune_by_norm", "prune_by_attention", "prune_diverse")


@settings(deadline=None, max_examples=150)
@given(GRIDS, RATIOS, st.sampled_from(["average_pool", *CHOOSING]), st.integers(0, 2**16), st.booleans())
def test_counts_and_places(grids: list[tuple[int, int]], ratio: float, method: str, seed: int, equal: bool) -> None:
    total = sum(a * b for a, b in grids)
    tokens = torch.randn(total, 4, generator=torch.Generator().manual_seed(seed))
    if equal:  # ties everywhere
        tokens = tokens[:1].expand(total, -1)
    model = VisionTokenReducer(method, ratio)
    found = model(tokens, torch.tensor(grids))
    assert found.lengths == [model.reduction.count_tokens(*grid) for grid in grids]
    assert all(1 <= left <= a * b for left, (a, b) in zip(found.lengths, grids, strict=True))
    assert sum(found.lengths) == len(found.tokens) == len(found.kept_index) == len(found.sizes)
    assert (found.kept_index.diff() > 0).all()
    assert torch.equal(found.assignment[found.kept_index], torch.arange(len(found.kept_index)))
    held = torch.bincount(found.assignment[found.assignment >= 0], minlength=len(found.kept_index))
    assert held.tolist() == found.sizes.tolist()
    if not method.startswith("prune"):
        assert found.sizes.sum() == total
    lengths = torch.tensor([a * b for a, b in grids])
    image_of = torch.arange(len(grids)).repeat_interleave(lengths)
    left_of = torch.arange(len(grids)).repeat_interleave(torch.tensor(found.lengths))
    kept = found.assignment >= 0
    assert torch.equal(left_of[found.assignment[kept]], image_of[kept])


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.integers(1, 60), st.sampled_from(CHOOSING), st.integers(0, 2**16))
def test_a_count_is_a_limit(grids: list[tuple[int, int]], count: int, method: str, seed: int) -> None:
    tokens = torch.randn(sum(a * b for a, b in grids), 4, generator=torch.Generator().manual_seed(seed))
    found = VisionTokenReducer(method, count=count)(tokens, grids)
    assert found.lengths == [min(count, a * b) for a, b in grids]
