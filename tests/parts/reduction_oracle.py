"""Loops over single tokens in float64, which the methods of `VisionTokenReducer` are compared with."""

import math

import torch
from torch import Tensor


def cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of the angle between two vectors."""
    return float(first @ second / (first.norm() * second.norm()))


def merge(tokens: Tensor, count: int) -> tuple[Tensor, list[list[int]]]:
    """Rounds of bipartite matching: the tokens `(K, D)`, and the original ones that each holds."""
    groups = [[index] for index in range(len(tokens))]
    places = list(range(len(tokens)))
    vectors = [token.clone() for token in tokens.double()]
    while len(vectors) > count:
        pairs = []
        for even in range(0, len(vectors), 2):
            odds = [(cosine(vectors[even], vectors[odd]), -odd) for odd in range(1, len(vectors), 2)]
            if odds:
                best, odd = max(odds)
                pairs.append((best, -even, -odd))
        pairs.sort(reverse=True)
        merged: dict[int, list[int]] = {}
        for _, even, odd in pairs[: min(len(vectors) // 2, len(vectors) - count)]:
            merged.setdefault(odd, []).append(-even)
        gone = {even for evens in merged.values() for even in evens}
        for odd, evens in merged.items():
            members = [odd, *evens]
            total = sum(len(groups[one]) for one in members)
            vectors[odd] = sum(vectors[one] * len(groups[one]) for one in members) / total
            groups[odd] = sorted(index for one in members for index in groups[one])
        left = [index for index in range(len(vectors)) if index not in gone]
        vectors, groups, places = ([values[index] for index in left] for values in (vectors, groups, places))
    return torch.stack(vectors), groups


def diverse(tokens: Tensor, count: int) -> list[int]:
    """Tokens with the largest distance to the nearest of those chosen, in the order of their choice."""
    tokens = tokens.double()
    distance = [[1 - cosine(a, b) for b in tokens] for a in tokens]
    everyone = range(len(tokens))
    nearest = [min((distance[i][j] for j in everyone if j != i), default=math.inf) for i in everyone]
    chosen = [max(everyone, key=lambda i: (nearest[i], -i))]
    while len(chosen) < count:
        rest = [i for i in everyone if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(distance[i][j] for j in chosen), -i)))
    return chosen


def attention(tokens: Tensor, query: Tensor) -> list[float]:
    """Softmax of the products of a query with the patches of tokens, summed over the patches of each."""
    width = len(query)
    patches = tokens.double().reshape(-1, width)
    scores = [math.exp(float(patch @ query.double()) / math.sqrt(width)) for patch in patches]
    each = len(patches) // len(tokens)
    return [sum(scores[i * each : (i + 1) * each]) / sum(scores) for i in range(len(tokens))]


def pool(tokens: Tensor, rows: int, columns: int, height: int, width: int) -> Tensor:
    """Means of the cells of a grid."""
    grid = tokens.double().view(rows, columns, -1)
    cells = []
    for i in range(height):
        for j in range(width):
            down = range(i * rows // height, -(-(i + 1) * rows // height))
            across = range(j * columns // width, -(-(j + 1) * columns // width))
            cells.append(torch.stack([grid[a, b] for a in down for b in across]).mean(0))
    return torch.stack(cells)


def shuffle(tokens: Tensor, rows: int, columns: int, factor: int) -> Tensor:
    """Squares of neighbours side by side, zeros beyond the grid."""
    grid, blocks = tokens.view(rows, columns, -1), []
    for i in range(0, rows, factor):
        for j in range(0, columns, factor):
            inside = [(i + a, j + b) for a in range(factor) for b in range(factor)]
            zeros = torch.zeros_like(grid[0, 0])
            blocks.append(torch.cat([grid[a, b] if a < rows and b < columns else zeros for a, b in inside]))
    return torch.stack(blocks)
