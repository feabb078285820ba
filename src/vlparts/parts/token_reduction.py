"""Reduction of vision tokens: fewer tokens for each image, by pooling, attention, merging or choice.

Shapes: n images (or frames, or views), T tokens of all of them, K tokens that are left, D channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from .ops_attention import packed_attention
from .ops_linear import apply_linear
from .pos_embed_tables import sinusoids
from .token_merging import RemainingTokens, merge_tokens
from .token_reduction_types import TokenReduction

__all__ = ["ReducedTokens", "TokenResampler", "VisionTokenReducer"]

_HEAD_WIDTH = 128  # channels of a head of the resampler


class ReducedTokens(NamedTuple):
    """What is left of the tokens of several images, image after image.

    Attributes:
        tokens: `(K, D)`, in the order of each image.
        lengths: Number of tokens of each image.
        kept_index: `(K,)` int64, the token of T whose place each keeps; -1 for the queries of a resampler.
        assignment: `(T,)` int64, the token of K that holds each; -1 for one that was dropped.
        sizes: `(K,)` number of tokens that each holds; float32.
    """

    tokens: Tensor
    lengths: list[int]
    kept_index: Tensor
    assignment: Tensor
    sizes: Tensor

    def scatter(self, tokens: Tensor | None = None) -> Tensor:
        """Put tokens back to the places of all: each place gets the token that holds it, a dropped one zeros.

        Args:
            tokens: `(K, C)` of any width, such as the output of a projector; None for the tokens themselves.

        Returns:
            `(T, C)`.
        """
        tokens = self.tokens if tokens is None else tokens
        return pad(tokens, (0, 0, 0, 1))[self.assignment]  # -1 is the last row


class TokenResampler(nn.Module):
    """Learned queries that attend to the tokens of each image (Qwen-VL, arXiv 2308.12966, section 2.1).

    One layer of cross-attention, with normalised queries and tokens. Tokens have sinusoidal positions of their row and
    column, so that images of any size and shape can be resampled.

    Args:
        width: D, a multiple of 4.
        count: Number of queries.
        num_heads: Heads of the attention; None for heads of 128 channels, or one.

    Raises:
        ValueError: If `width` is no multiple of 4 or `num_heads` does not divide it.
    """

    def __init__(self, width: int, count: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads = max(1, width // _HEAD_WIDTH) if num_heads is None else num_heads
        if num_heads is None and width % self.num_heads:
            self.num_heads = 1
        if width % 4 or self.num_heads < 1 or width % self.num_heads:
            raise ValueError(
                f"`num_heads` must divide the width of the tokens, a multiple of 4, got {self.num_heads} and {width}."
            )
        self.queries = nn.Parameter(torch.zeros(count, width))
        self.norm_q = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Resample `(T, D)` tokens with rows and columns `(T, 2)` to `(n * count, D)`."""
        half = tokens.shape[1] // 2
        places = sinusoids(position_ids, half, torch.float32).flatten(1).to(tokens.dtype)
        tokens, images = self.norm_kv(tokens), len(lengths)
        query = apply_linear(self.q_proj, self.norm_q(self.queries)).unflatten(-1, (self.num_heads, -1))
        key = apply_linear(self.k_proj, tokens + places).unflatten(-1, (self.num_heads, -1))
        value = apply_linear(self.v_proj, tokens).unflatten(-1, (self.num_heads, -1))
        bounds = [_boundaries(lengths, tokens.device), _boundaries([len(query)] * images, tokens.device)]
        attended = packed_attention(query.repeat(images, 1, 1), key, value, bounds[1], bounds[0])
        return apply_linear(self.o_proj, attended.flatten(-2))


def _boundaries(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Cumulative lengths with a leading zero, `(n + 1,)` int32."""
    return pad(torch.tensor(lengths, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32), (1, 0))


class VisionTokenReducer(nn.Module):
    """Leave fewer tokens of each image, whatever it is packed with.

    All methods but "resampler" need no training. Gradients reach the tokens that are kept or averaged; which they are
    is chosen without gradients.

    Args:
        method: Name of the method; see [`TokenReduction`].
        ratio: Share of the tokens of an image that is left.
        count: Number of tokens of an image that are left. One of both is given, as the method takes it.
        width: D, which only "resampler" needs.
        **options: Options of the method.

    Raises:
        ValueError: If there is no such method or option, the numbers do not fit it, or `width` is missing.
    """

    def __init__(
        self,
        method: str,
        ratio: float | None = None,
        count: int | None = None,
        *,
        width: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.reduction = TokenReduction(method, ratio, count, options)
        self.resampler = None
        if method == "resampler":
            if width is None or count is None:
                raise ValueError("`width` must be given for 'resampler', got None.")
            self.resampler = TokenResampler(width, count, **options)

    def extra_repr(self) -> str:
        """Method and numbers."""
        given = {"ratio": self.reduction.ratio, "count": self.reduction.count, **self.reduction.options}
        return ", ".join([self.reduction.method, *(f"{k}={v}" for k, v in given.items() if v is not None)])

    def forward(
        self,
        tokens: Tensor,
        grids: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        position_ids: Tensor | None = None,
        class_tokens: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> ReducedTokens:
        """Reduce the tokens of each image.

        Args:
            tokens: `(T, D)`, image after image, each in reading order.
            grids: `(n, 2)` rows and columns of the tokens of each image.
            lengths: Number of tokens of each image, instead of `grids` where tokens are missing in these.
            position_ids: `(T, 2)` int64 rows and columns with `lengths`; only "resampler" uses them.
            class_tokens: `(n, C)` class token of each image, for "prune_by_attention" with this query. C divides D: a
                token of several patches gets the sum of their attention.
            scores: `(T,)` attention on each token, from wherever it is known, in place of that which
                "prune_by_attention" computes: the softmax of the query's products with the tokens, divided by the
                square root of their width. (The published programs take the weights of a layer of the encoder.)

        Raises:
            ValueError: If lengths or grids do not fit the tokens, the method needs what is missing, or an input is
                given that it does not use.
        """
        sizes, places = self._check(tokens, grids, lengths, position_ids)
        self._check_attention(tokens, len(sizes), class_tokens, scores)
        if self.resampler is not None:
            if position_ids is None:
                position_ids = torch.cat([_positions(rows, width, tokens.device) for rows, width in places or ()])
            return self._resample(tokens, position_ids, sizes)
        parts: list[RemainingTokens] = []
        given = [None] * len(sizes) if scores is None else scores.split(sizes)
        for image, part in enumerate(tokens.split(sizes)):
            grid = None if places is None else places[image]
            scored = given[image]
            if self.reduction.method == "prune_by_attention" and scored is None:
                scored = attention_scores(part, part.mean(0) if class_tokens is None else class_tokens[image])
            parts.append(self._reduce(part, grid, scored))
        return _join(parts, sizes)

    def _reduce(self, tokens: Tensor, grid: tuple[int, int] | None, scores: Tensor | None) -> RemainingTokens:
        """Reduce the tokens `(t, D)` of one image."""
        method = self.reduction.method
        count = self.reduction.count_tokens(*((len(tokens),) if grid is None else grid))
        if method == "pixel_shuffle" and grid is not None:
            return _shuffle(tokens, grid, self.reduction.factor)
        if count == len(tokens):
            return _choose(tokens, torch.arange(count, device=tokens.device))
        if method == "average_pool" and grid is not None:
            return _pool(tokens, grid, *(self.reduction.reduce_grid(*grid) or grid))
        if method == "merge_similar":
            return merge_tokens(tokens, count)
        if method == "prune_diverse":
            return _choose(tokens, choose_diverse(tokens, count))
        if scores is None:
            scores = torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=_precise(tokens))
            if self.reduction.options.get("keep") == "smallest":
                scores = -scores
        return _choose(tokens, scores.argsort(descending=True, stable=True)[:count])

    def _resample(self, tokens: Tensor, position_ids: Tensor, sizes: list[int]) -> ReducedTokens:
        assert self.resampler is not None
        assert self.reduction.count is not None
        queries = self.resampler(tokens, position_ids, sizes)
        none = torch.full((len(queries),), -1, device=tokens.device)
        counts = torch.tensor(sizes, device=tokens.device, dtype=torch.float32) / self.reduction.count
        return ReducedTokens(
            queries,
            [self.reduction.count] * len(sizes),
            none,
            torch.full((len(tokens),), -1, device=tokens.device),
            counts.repeat_interleave(self.reduction.count),
        )

    def _check(
        self,
        tokens: Tensor,
        grids: Tensor | Sequence[Sequence[int]] | None,
        lengths: Sequence[int] | None,
        position_ids: Tensor | None,
    ) -> tuple[list[int], list[tuple[int, int]] | None]:
        """Check the numbers of tokens; returns lengths, and rows and columns if there are grids."""
        if (grids is None) == (lengths is None):
            raise ValueError("One of `grids` and `lengths` must be given, got both or neither.")
        places = None
        if grids is not None:
            if position_ids is not None:
                raise ValueError("`position_ids` must be given with `lengths` only; `grids` describe all tokens.")
            rows = grids.tolist() if isinstance(grids, Tensor) else grids
            if any(len(grid) != 2 for grid in rows):
                raise ValueError(f"`grids` must hold rows and columns of each image, got {rows}.")
            places = [(int(grid[0]), int(grid[1])) for grid in rows]
            lengths = [height * width for height, width in places]
        sizes = [int(length) for length in lengths or ()]
        if tokens.ndim != 2 or sum(sizes) != len(tokens) or min(sizes, default=1) < 1:
            raise ValueError(
                f"`{'grids' if lengths is None or places else 'lengths'}` must describe the rows of `tokens` (T, D), "
                f"at least one for each image, got {sizes} for shape {tuple(tokens.shape)}."
            )
        if places is None and self.resampler is not None and position_ids is None:
            raise ValueError("`position_ids` must be given with `lengths` for 'resampler', got None.")
        if position_ids is not None and position_ids.shape != (len(tokens), 2):
            raise ValueError(f"`position_ids` must have shape {(len(tokens), 2)}, got {tuple(position_ids.shape)}.")
        return sizes, places

    def _check_attention(
        self, tokens: Tensor, images: int, class_tokens: Tensor | None, scores: Tensor | None
    ) -> None:
        attends = self.reduction.method == "prune_by_attention"
        needs = attends and self.reduction.options.get("query") == "class_token"
        if scores is not None and not attends or class_tokens is not None and not needs:
            name = "scores" if scores is not None and not attends else "class_tokens"
            raise ValueError(f"`{name}` must be None for this reduction, {self.extra_repr()}, which does not use it.")
        if scores is not None and scores.shape != tokens.shape[:1]:
            raise ValueError(f"`scores` must have shape {tuple(tokens.shape[:1])}, got {tuple(scores.shape)}.")
        if needs and scores is None:
            if class_tokens is None:
                raise ValueError("`class_tokens` must be given for the query 'class_token', got None.")
            if class_tokens.ndim != 2 or len(class_tokens) != images or tokens.shape[1] % class_tokens.shape[1]:
                raise ValueError(
                    f"`class_tokens` must have shape ({images}, C), where C divides {tokens.shape[1]}, got "
                    f"{tuple(class_tokens.shape)}."
                )


@torch.no_grad()
def attention_scores(tokens: Tensor, query: Tensor) -> Tensor:
    """Attention of a query `(C,)` on tokens `(t, D)` of D / C patches each: `(t,)`, with the sum 1."""
    precise = _precise(tokens)
    patches = tokens.reshape(-1, len(query)).to(precise)
    weights = torch.softmax(patches @ query.to(precise) / len(query) ** 0.5, 0)
    return weights.view(len(tokens), -1).sum(1)


@torch.no_grad()
def choose_diverse(tokens: Tensor, count: int) -> Tensor:
    """Choose tokens that differ from each other (DivPrune, arXiv 2503.02175, section 3): `(count,)` int64.

    The distance is one minus the cosine. The first token has the largest distance to its nearest one; each further
    one has the largest distance to the nearest of those chosen. Of equal ones the first is chosen.

    Args:
        tokens: `(t, D)` of one image.
        count: Number of tokens, at most t.
    """
    unit = normalize(tokens.to(_precise(tokens)), dim=-1)
    distances = 1 - unit @ unit.T
    distances.fill_diagonal_(torch.inf)
    chosen = [distances.amin(0).argmax()]
    nearest = distances[chosen[0]]
    nearest[chosen[0]] = -torch.inf
    for _ in range(count - 1):
        last = nearest.argmax()
        chosen.append(last)
        nearest = torch.minimum(nearest, distances[last])
        nearest[last] = -torch.inf
    return torch.stack(chosen)


def _precise(tokens: Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)


def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Row and column of each token of a grid, `(rows * columns, 2)`."""
    index = torch.arange(rows * columns, device=device)
    return torch.stack((index // columns, index % columns), 1)


def _choose(tokens: Tensor, chosen: Tensor) -> RemainingTokens:
    """Keep the chosen tokens of one image, in its order."""
    index = chosen.sort().values
    assignment = torch.full((len(tokens),), -1, device=tokens.device)
    assignment[index] = torch.arange(len(index), device=tokens.device)
    sizes = torch.ones(len(index), device=tokens.device)
    kept = tokens if len(index) == len(tokens) else tokens[index]
    return RemainingTokens(kept, index, assignment, sizes)


def _cells(grid: tuple[int, int], cells: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The cell whose middle is nearest to each token of a grid, and the token in the middle of each cell."""
    (rows, columns), (height, width) = grid, cells
    row, column = _positions(rows, columns, device).unbind(1)
    cell = (row * 2 + 1) * height // (2 * rows) * width + (column * 2 + 1) * width // (2 * columns)
    down, across = _positions(height, width, device).unbind(1)
    middle = (down * 2 + 1) * rows // (2 * height) * columns + (across * 2 + 1) * columns // (2 * width)
    return cell, middle


def _averaging(size: int, cells: int, like: Tensor) -> Tensor:
    """Weights `(cells, size)` of the mean of each cell of an axis."""
    index, cell = torch.arange(size, device=like.device), torch.arange(cells, device=like.device)[:, None]
    inside = ((index >= cell * size // cells) & (index * cells < (cell + 1) * size)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def _pool(tokens: Tensor, grid: tuple[int, int], height: int, width: int) -> RemainingTokens:
    """Average the tokens of one image in `height` x `width` cells, which overlap where they do not divide the grid."""
    cell, middle = _cells(grid, (height, width), tokens.device)
    maps = tokens.unflatten(0, grid).to(_precise(tokens))
    down, across = (_averaging(*sides, maps) for sides in zip(grid, (height, width), strict=True))
    pooled = torch.einsum("hr,rcd,wc->hwd", down, maps, across).flatten(0, 1).to(tokens.dtype)
    return RemainingTokens(pooled, middle, cell, torch.bincount(cell, minlength=height * width).float())


def _shuffle(tokens: Tensor, grid: tuple[int, int], factor: int) -> RemainingTokens:
    """Put squares of neighbours of one image side by side in one token, row by row."""
    rows, columns = grid
    height, width = -(-rows // factor), -(-columns // factor)
    maps = pad(tokens.view(rows, columns, -1), (0, 0, 0, width * factor - columns, 0, height * factor - rows))
    blocks = maps.view(height, factor, width, factor, -1).transpose(1, 2).flatten(2).flatten(0, 1)
    row, column = _positions(rows, columns, tokens.device).unbind(1)
    cell = row // factor * width + column // factor
    down, across = _positions(height, width, tokens.device).unbind(1)
    first = down * factor * columns + across * factor
    return RemainingTokens(blocks, first, cell, torch.bincount(cell, minlength=height * width).float())


def _join(parts: list[RemainingTokens], sizes: Sequence[int]) -> ReducedTokens:
    """Put the images together again."""
    tokens, index, assignment, counts = zip(*parts, strict=True)
    lengths = [len(part) for part in tokens]
    if len(parts) == 1:
        return ReducedTokens(tokens[0], lengths, index[0], assignment[0], counts[0])
    before, after, start, left = [], [], 0, 0
    for part, length, places, cells in zip(lengths, sizes, index, assignment, strict=True):
        before.append(places + start)
        after.append(torch.where(cells < 0, cells, cells + left))
        start, left = start + length, left + part
    return ReducedTokens(torch.cat(tokens), lengths, torch.cat(before), torch.cat(after), torch.cat(counts))
