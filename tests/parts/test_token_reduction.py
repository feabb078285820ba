"""Reduction of vision tokens against loops, whatever the images are packed with."""

import re

import pytest
import torch
from torch import Tensor
from transformers.models.internvl.modeling_internvl import InternVLModel

from tests.parts import reduction_oracle as oracle
from tests.tiny import order_one
from vlparts import VisionTokenReducer
from vlparts.parts.token_reduction import ReducedTokens, attention_scores, choose_diverse
from vlparts.parts.token_reduction_types import TOKEN_REDUCTIONS, TokenReduction

GRIDS = [(4, 6), (5, 3), (1, 1), (7, 8)]
WIDTH = 8
CHOSEN = ("merge_similar", "prune_by_norm", "prune_by_attention", "prune_diverse")
BY_RATIO = ("average_pool", "pixel_shuffle", *CHOSEN)


def tokens_of(grids: list[tuple[int, int]], dtype: torch.dtype = torch.float64, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(len(grids))
    return torch.randn(sum(a * b for a, b in grids), width, generator=generator, dtype=torch.float64).to(dtype)


def reducer(method: str, ratio: float = 0.25) -> VisionTokenReducer:
    if method == "keep_all":
        return VisionTokenReducer(method)
    if method == "resampler":
        return order_one(VisionTokenReducer(method, count=3, width=WIDTH, num_heads=2)).double()
    return VisionTokenReducer(method, ratio)


def images(reduced: ReducedTokens) -> list[Tensor]:
    return list(reduced.tokens.split(reduced.lengths))


def assert_equal(method: str, found: Tensor, expected: Tensor) -> None:
    """Equal to the bit, but for matrix products, whose sums depend on the number of rows."""
    tolerance = 1e-12 if method == "resampler" else 0.0
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("method", TOKEN_REDUCTIONS)
def test_an_image_is_reduced_as_if_it_were_alone(method: str) -> None:
    model, tokens = reducer(method), tokens_of(GRIDS)
    parts = tokens.split([a * b for a, b in GRIDS])
    packed = model(tokens, GRIDS)
    start = kept = 0
    for grid, part, found in zip(GRIDS, parts, images(packed), strict=True):
        alone = model(part, [grid])
        assert_equal(method, alone.tokens, found)
        assert alone.lengths == [model.reduction.count_tokens(*grid)] == [len(found)]
        end, last = start + len(part), kept + len(found)
        own = packed.assignment[start:end]
        assert torch.equal(torch.where(own < 0, own, own - kept), alone.assignment)
        index = packed.kept_index[kept:last]
        assert torch.equal(torch.where(index < 0, index, index - start), alone.kept_index)
        assert torch.equal(packed.sizes[kept:last], alone.sizes)
        start, kept = end, last


@pytest.mark.parametrize("method", TOKEN_REDUCTIONS)
def test_the_order_of_images_does_not_matter(method: str) -> None:
    model, tokens = reducer(method), tokens_of(GRIDS)
    parts = list(tokens.split([a * b for a, b in GRIDS]))
    forward, backward = images(model(tokens, GRIDS)), images(model(torch.cat(parts[::-1]), GRIDS[::-1]))
    for one, other in zip(forward, backward[::-1], strict=True):
        assert_equal(method, one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["keep_all", *BY_RATIO])
def test_a_ratio_of_one_changes_no_bit(method: str, dtype: torch.dtype) -> None:
    tokens = tokens_of(GRIDS, dtype)
    reduced = reducer(method, 1.0)(tokens, GRIDS)
    assert torch.equal(reduced.tokens, tokens)
    assert reduced.kept_index.tolist() == reduced.assignment.tolist() == list(range(len(tokens)))
    assert torch.equal(reduced.sizes, torch.ones(len(tokens)))
    assert torch.equal(reduced.scatter(), tokens)


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.3, 0.1])
def test_merging_equals_loops(ratio: float) -> None:
    for grid in GRIDS:
        tokens = tokens_of([grid])
        reduced = VisionTokenReducer("merge_similar", ratio)(tokens, [grid])
        expected, groups = oracle.merge(tokens, reduced.lengths[0])
        torch.testing.assert_close(reduced.tokens, expected)
        found = [(reduced.assignment == one).nonzero().flatten().tolist() for one in range(len(groups))]
        assert found == groups
        assert reduced.sizes.tolist() == [len(group) for group in groups]
        means = torch.stack([tokens[group].mean(0) for group in groups])
        torch.testing.assert_close(reduced.tokens, means)  # weighted means of means are means of all
        assert all(int(index) in group for index, group in zip(reduced.kept_index, groups, strict=True))


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_diverse_tokens_equal_loops(count: int) -> None:
    for grid in GRIDS:
        tokens = tokens_of([grid])
        found = VisionTokenReducer("prune_diverse", count=count)(tokens, [grid])
        expected = oracle.diverse(tokens, min(count, len(tokens)))
        assert found.kept_index.tolist() == sorted(expected)
        if count < len(tokens):
            assert choose_diverse(tokens, count).tolist() == expected
        assert torch.equal(found.tokens, tokens[found.kept_index])


def test_equal_tokens_are_chosen_once() -> None:
    tokens = tokens_of([(2, 2)]).repeat(3, 1)
    chosen = choose_diverse(tokens, 12).tolist()
    assert sorted(chosen) == list(range(12))
    assert {index % 4 for index in chosen[:4]} == {0, 1, 2, 3}


@pytest.mark.parametrize("keep", ["largest", "smallest"])
def test_pruning_by_norm(keep: str) -> None:
    tokens = tokens_of([(5, 4)])
    found = VisionTokenReducer("prune_by_norm", count=6, keep=keep)(tokens, [(5, 4)])
    order = sorted(range(20), key=lambda i: float(tokens[i].norm()), reverse=keep == "largest")
    assert found.kept_index.tolist() == sorted(order[:6])


@pytest.mark.parametrize("patches", [1, 2])
@pytest.mark.parametrize("query", ["mean", "class_token"])
def test_pruning_by_attention(query: str, patches: int) -> None:
    grids, tokens = [(5, 4), (3, 3)], tokens_of([(5, 4), (3, 3)])
    class_tokens = tokens_of([(1, 2)], width=WIDTH // patches) if query == "class_token" else None
    model = VisionTokenReducer("prune_by_attention", 0.4, query=query)
    found = model(tokens, grids, class_tokens=class_tokens)
    start = 0
    for image, (part, length) in enumerate(zip(tokens.split([20, 9]), found.lengths, strict=True)):
        asked = part.mean(0) if class_tokens is None else class_tokens[image]
        scores = oracle.attention(part, asked)
        torch.testing.assert_close(attention_scores(part, asked).tolist(), scores)
        order = sorted(range(len(part)), key=lambda i: scores[i], reverse=True)[:length]
        expected = [index + (20 if image else 0) for index in sorted(order)]
        assert found.kept_index[start : start + length].tolist() == expected
        start += length
    given = model(tokens, grids, scores=torch.arange(29.0), class_tokens=None)
    assert given.kept_index.tolist() == [*range(12, 20), *range(25, 29)]


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.1, 1 / 9])
def test_pooling_equals_loops(ratio: float) -> None:
    for grid in GRIDS:
        tokens = tokens_of([grid])
        found = VisionTokenReducer("average_pool", ratio)(tokens, [grid])
        height, width = found_grid = TokenReduction("average_pool", ratio).reduce_grid(*grid)
        torch.testing.assert_close(found.tokens, oracle.pool(tokens, *grid, height, width))
        assert found_grid == tuple(max(1, int(side * ratio**0.5 + 0.5)) for side in grid)
        assert found.sizes.sum() == len(tokens)
        assert torch.equal(found.assignment[found.kept_index], torch.arange(height * width))


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_equals_loops(factor: int) -> None:
    for grid in GRIDS:
        tokens = tokens_of([grid])
        found = VisionTokenReducer("pixel_shuffle", 1 / factor**2)(tokens, [grid])
        assert torch.equal(found.tokens, oracle.shuffle(tokens, *grid, factor))
        assert torch.equal(found.assignment[found.kept_index], torch.arange(len(found.tokens)))


def test_pixel_shuffle_is_that_of_internvl() -> None:
    tokens = tokens_of([(4, 6)])
    expected = InternVLModel.pixel_shuffle(None, tokens.view(1, 4, 6, WIDTH), scale_factor=0.5)
    found = VisionTokenReducer("pixel_shuffle", 0.25)(tokens, [(4, 6)])
    assert torch.equal(found.tokens, expected.reshape(-1, 4 * WIDTH))


def test_a_resampler_attends_to_the_tokens_of_one_image() -> None:
    model, grid = reducer("resampler"), (4, 3)
    tokens, part = tokens_of([grid]), model.resampler
    angles = torch.tensor([[place * 10000.0 ** (-2 * i / 4) for i in range(2)] for place in range(4)]).double()
    sines = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
    places = torch.stack([torch.cat((sines[row], sines[column])) for row in range(4) for column in range(3)])
    queries, normed = part.norm_q(part.queries), part.norm_kv(tokens)
    attended = torch.nn.functional.scaled_dot_product_attention(
        part.q_proj(queries).view(3, 2, 4).transpose(0, 1),
        part.k_proj(normed + places).view(12, 2, 4).transpose(0, 1),
        part.v_proj(normed).view(12, 2, 4).transpose(0, 1),
    )
    expected = part.o_proj(attended.transpose(0, 1).flatten(1))
    torch.testing.assert_close(model(tokens, [grid]).tokens, expected, atol=1e-6, rtol=1e-6)
    positions = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    moved = model(tokens, lengths=[12], position_ids=positions)
    assert torch.equal(moved.tokens, model(tokens, [grid]).tokens)


@pytest.mark.parametrize("method", CHOSEN)
def test_tokens_without_a_grid(method: str) -> None:
    tokens = tokens_of(GRIDS)
    lengths = [a * b for a, b in GRIDS]
    found, expected = reducer(method)(tokens, lengths=lengths), reducer(method)(tokens, GRIDS)
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("method", BY_RATIO)
def test_gradients_reach_what_is_left(method: str) -> None:
    tokens = tokens_of(GRIDS).requires_grad_()
    found = reducer(method)(tokens, GRIDS)
    weights = torch.randn(found.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (found.tokens * weights).sum().backward()
    if method.startswith("prune"):
        expected = torch.zeros_like(tokens).index_copy(0, found.kept_index, weights)
        torch.testing.assert_close(tokens.grad, expected)
    elif method == "merge_similar":
        torch.testing.assert_close(tokens.grad, (weights / found.sizes[:, None])[found.assignment])
    else:
        assert (tokens.grad != 0).all()


def test_scattering_puts_tokens_back() -> None:
    tokens = tokens_of(GRIDS)
    found = reducer("prune_diverse")(tokens, GRIDS)
    back = found.scatter(found.tokens[:, :2])
    assert torch.equal(back[found.kept_index], found.tokens[:, :2])
    assert int((back != 0).any(1).sum()) == len(found.tokens)
    merged = reducer("merge_similar")(tokens, GRIDS)
    assert torch.equal(merged.scatter(), merged.tokens[merged.assignment])


BAD = [
    ({"method": "none"}, "`method` must be one of keep_all, average_pool"),
    ({"method": "merge_similar"}, "'merge_similar' takes `ratio` or `count`, got ratio=None and count=None"),
    ({"method": "merge_similar", "ratio": 0.5, "count": 3}, "got ratio=0.5 and count=3"),
    ({"method": "keep_all", "ratio": 0.5}, "'keep_all' takes neither `ratio` nor `count`"),
    ({"method": "average_pool", "count": 4}, "'average_pool' takes `ratio`, got ratio=None and count=4"),
    ({"method": "resampler", "ratio": 0.5}, "'resampler' takes `count`"),
    ({"method": "resampler", "count": 4}, "`width` must be given for 'resampler', got None"),
    ({"method": "resampler", "count": 4, "width": 6}, "a multiple of 4, got 1 and 6"),
    ({"method": "resampler", "count": 4, "width": 8, "num_heads": 3}, "`num_heads` must divide"),
    ({"method": "prune_diverse", "ratio": 0}, "`ratio` must be above 0 and at most 1, got 0"),
    ({"method": "prune_diverse", "ratio": 1.5}, "`ratio` must be above 0 and at most 1, got 1.5"),
    ({"method": "prune_diverse", "ratio": float("nan")}, "`ratio` must be above 0 and at most 1, got nan"),
    ({"method": "prune_diverse", "count": 0}, "`count` must be a positive integer, got 0"),
    ({"method": "prune_diverse", "count": True}, "`count` must be a positive integer, got True"),
    ({"method": "pixel_shuffle", "ratio": 0.5}, "`ratio` of 'pixel_shuffle' must be 1, 1/4, 1/9, ..., got 0.5"),
    ({"method": "prune_diverse", "ratio": 0.5, "keep": "largest"}, "'prune_diverse' has no option keep; it has none"),
    ({"method": "prune_by_norm", "ratio": 0.5, "keep": "some"}, "`keep` must be one of largest, smallest, got 'some'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=range(len(BAD)))
def test_arguments_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        VisionTokenReducer(**arguments)


TWO = torch.zeros(6, 8)
BAD_INPUTS = [
    ("prune_diverse", {}, "One of `grids` and `lengths` must be given"),
    ("prune_diverse", {"grids": [(2, 3)], "lengths": [6]}, "One of `grids` and `lengths` must be given"),
    ("prune_diverse", {"grids": [(2, 2)]}, "`grids` must describe the rows of `tokens`"),
    ("prune_diverse", {"grids": [(1, 2, 3)]}, "`grids` must hold rows and columns of each image"),
    ("prune_diverse", {"lengths": [6, 0]}, "at least one for each image, got [6, 0]"),
    ("average_pool", {"lengths": [6]}, "'average_pool' needs rows and columns of tokens"),
    ("resampler", {"lengths": [6]}, "`position_ids` must be given with `lengths` for 'resampler'"),
    ("resampler", {"lengths": [6], "position_ids": TWO}, "`position_ids` must have shape (6, 2), got (6, 8)"),
    ("prune_diverse", {"grids": [(2, 3)], "position_ids": TWO}, "`position_ids` must be given with `lengths` only"),
    ("prune_diverse", {"grids": [(2, 3)], "scores": TWO[:, 0]}, "`scores` must be None for this reduction"),
    ("prune_by_attention", {"grids": [(2, 3)], "scores": TWO}, "`scores` must have shape (6,), got (6, 8)"),
    ("prune_by_attention", {"grids": [(2, 3)], "class_tokens": TWO[:1]}, "`class_tokens` must be None"),
    ("class_token", {"grids": [(2, 3)]}, "`class_tokens` must be given for the query 'class_token', got None"),
    ("class_token", {"grids": [(2, 3)], "class_tokens": TWO}, "`class_tokens` must have shape (1, C)"),
]


@pytest.mark.parametrize(("method", "inputs", "message"), BAD_INPUTS, ids=range(len(BAD_INPUTS)))
def test_inputs_that_do_not_fit(method: str, inputs: dict, message: str) -> None:
    if method == "class_token":
        model = VisionTokenReducer("prune_by_attention", 0.5, query="class_token")
    else:
        model = reducer(method)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(TWO.double(), **inputs)
