"""Ways to reduce vision tokens, as data: what each takes, and how many tokens it leaves.

Configurations and processors count tokens with this file alone; the arithmetic is in `token_reduction`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TOKEN_REDUCTIONS", "TokenReduction", "check_merge_options", "count_share"]


@dataclass(frozen=True)
class ReductionMethod:
    """What a method takes.

    Attributes:
        takes_ratio: Whether the share of tokens that it leaves can be given.
        takes_count: Whether their number can be given.
        on_grid: Whether it needs rows and columns of an image, which is not known after patches were dropped.
        chooses: Whether the features decide which tokens are left.
        widens: Whether a token gets the channels of several.
        options: Names of its options.
    """

    takes_ratio: bool = True
    takes_count: bool = True
    on_grid: bool = False
    chooses: bool = True
    widens: bool = False
    options: tuple[str, ...] = ()


TOKEN_REDUCTIONS: dict[str, ReductionMethod] = {
    "keep_all": ReductionMethod(takes_ratio=False, takes_count=False, chooses=False),
    "average_pool": ReductionMethod(takes_count=False, on_grid=True, chooses=False),
    "pixel_shuffle": ReductionMethod(takes_count=False, on_grid=True, chooses=False, widens=True),
    "resampler": ReductionMethod(takes_ratio=False, chooses=False, options=("num_heads",)),
    "merge_similar": ReductionMethod(),
    "prune_by_norm": ReductionMethod(options=("keep",)),
    "prune_by_attention": ReductionMethod(options=("query",)),
    "prune_diverse": ReductionMethod(),
}
_CHOICES = {"keep": ("largest", "smallest"), "query": ("mean", "class_token")}


@dataclass(frozen=True)
class TokenReduction:
    """A way to reduce the tokens of each image, with its numbers.

    Args:
        method: One of:

            - "keep_all": all tokens, unchanged.
            - "average_pool": means of neighbours. A kernel of k x k tokens is the ratio `1 / k**2`; with others each
              side becomes its product with the ratio's square root, rounded.
            - "pixel_shuffle": k x k neighbours become one token with the channels of all (InternVL-1.5, arXiv
              2404.16821, section 3.1). The ratio is `1 / k**2`. Zeros fill the last row and column of a grid that k
              does not divide.
            - "resampler": `count` learned queries attend to the tokens of an image of any size (Qwen-VL, arXiv
              2308.12966, section 2.1). It has weights and needs training.
            - "merge_similar": rounds of bipartite matching, in which similar tokens become their mean, weighted by the
              number of tokens that each already holds (ToMe, arXiv 2210.09461, section 3).
            - "prune_by_norm": the tokens with the largest norm are kept, or the smallest.
            - "prune_by_attention": the tokens with the largest attention are kept, that of the class token or of the
              mean of all tokens (FasterVLM, arXiv 2412.01818; VisionZip, arXiv 2412.04467).
            - "prune_diverse": tokens are kept one after the other, always the one that differs most from those kept
              (DivPrune, arXiv 2503.02175).
        ratio: Share of the tokens that is left, above 0 and at most 1; the number is rounded, and at least 1.
        count: Number of tokens that are left, at most all. One of both is given, none for "keep_all".
        options: `keep` of "prune_by_norm": "largest" (default) or "smallest". `query` of "prune_by_attention": "mean"
            (default) or "class_token". `num_heads` of "resampler"; None for heads of 128 channels.

    Raises:
        ValueError: If there is no such method or option, or the numbers are missing, too many, or out of range.
    """

    method: str
    ratio: float | None = None
    count: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in TOKEN_REDUCTIONS:
            raise ValueError(f"`method` must be one of {', '.join(TOKEN_REDUCTIONS)}, got {self.method!r}.")
        self._check_numbers()
        unknown = sorted(set(self.options) - set(self.kind.options))
        if unknown:
            raise ValueError(
                f"{self.method!r} has no option {', '.join(unknown)}; it has {', '.join(self.kind.options) or 'none'}."
            )
        for name, value in self.options.items():
            if name in _CHOICES and value not in _CHOICES[name]:
                raise ValueError(f"`{name}` must be one of {', '.join(_CHOICES[name])}, got {value!r}.")

    def _check_numbers(self) -> None:
        given = [name for name in ("ratio", "count") if getattr(self, name) is not None]
        taken = [name for name in ("ratio", "count") if getattr(self.kind, f"takes_{name}")]
        if len(given) != min(1, len(taken)) or not set(given) <= set(taken):
            takes = " or ".join(f"`{name}`" for name in taken) or "neither `ratio` nor `count`"
            raise ValueError(f"{self.method!r} takes {takes}, got ratio={self.ratio!r} and count={self.count!r}.")
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise ValueError(f"`ratio` must be above 0 and at most 1, got {self.ratio!r}.")
        if self.count is not None and (type(self.count) is not int or self.count < 1):
            raise ValueError(f"`count` must be a positive integer, got {self.count!r}.")
        if self.kind.widens and abs((self.ratio or 0) * self.factor**2 - 1) > 1e-6:
            raise ValueError(f"`ratio` of {self.method!r} must be 1, 1/4, 1/9, ..., got {self.ratio!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON takes them."""
        return {"method": self.method, "ratio": self.ratio, "count": self.count, "options": dict(self.options)}

    @property
    def kind(self) -> ReductionMethod:
        """What the method takes."""
        return TOKEN_REDUCTIONS[self.method]

    @property
    def factor(self) -> int:
        """Side of the square of neighbours that become one wider token; 1 for methods that keep the width."""
        return round(self.ratio**-0.5) if self.kind.widens and self.ratio else 1

    def reduce_grid(self, rows: int, columns: int) -> tuple[int, int] | None:
        """Rows and columns of tokens that are left of an image, for methods that leave a grid."""
        if self.method == "average_pool" and self.ratio:
            side = self.ratio**0.5
            return count_share(rows, side), count_share(columns, side)
        if self.method == "pixel_shuffle":
            return -(-rows // self.factor), -(-columns // self.factor)
        return None

    def count_tokens(self, rows: int, columns: int | None = None) -> int:
        """Number of tokens that are left of an image, or of a frame of a video.

        Args:
            rows: Rows of tokens; the number of tokens if there is no grid.
            columns: Columns of tokens; None if there is no grid.

        Raises:
            ValueError: If the method needs a grid, and there is none.
        """
        if columns is None and self.kind.on_grid:
            raise ValueError(
                f"{self.method!r} needs rows and columns of tokens, which are not known here, as after redundant "
                "patches were dropped; expected a method that takes any tokens, such as 'merge_similar'."
            )
        grid = None if columns is None else self.reduce_grid(rows, columns)
        if grid is not None:
            return grid[0] * grid[1]
        tokens = rows * (1 if columns is None else columns)
        if self.method == "resampler":
            return self.count or 0
        if self.ratio is not None:
            return count_share(tokens, self.ratio)
        return tokens if self.count is None else min(tokens, self.count)


def count_share(tokens: int, ratio: float) -> int:
    """Number of tokens that a share leaves: rounded, at least one."""
    return max(1, math.floor(tokens * ratio + 0.5))


def check_merge_options(merge_layers: Sequence[int] | None, merge_ratio: float, num_layers: int) -> None:
    """Check the options of an encoder that merges tokens between its layers.

    Args:
        merge_layers: Indices of the layers after which tokens are merged; None for none.
        merge_ratio: Share of the tokens that each merge leaves.
        num_layers: Number of layers.

    Raises:
        ValueError: If a layer does not exist or occurs twice, or the share is not above 0 and at most 1.
    """
    layers = [*(merge_layers or ())]
    if len(set(layers)) != len(layers) or not set(layers) <= set(range(num_layers)):
        raise ValueError(f"`merge_layers` must name layers from 0 to {num_layers - 1}, each once, got {layers}.")
    if not (_is_number(merge_ratio) and 0 < merge_ratio <= 1):
        raise ValueError(f"`merge_ratio` must be above 0 and at most 1, got {merge_ratio!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
