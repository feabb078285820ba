"""Merging of similar tokens between the layers of an encoder over packed sequences (ToMe, arXiv 2210.09461).

The tokens of a segment are merged after chosen layers. Attention weighs a token by the number of patches that it holds
(section 3, "proportional attention"), and the output has one vector per patch again: those that became one token share
it. ToMe compares the keys of a layer; here it is the layer's output, which its section 4.1 finds nearly as good.

Shapes: `L` tokens of all segments, prefix tokens included, `D` width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.configuration_utils import PreTrainedConfig

from .packed_segments import Segments
from .token_merging import merge_tokens
from .token_reduction_types import count_share

__all__ = ["TokenMerger", "build_merger"]


class TokenMerger:
    """The merged tokens of one forward pass.

    Args:
        layers: Layers after which tokens are merged.
        ratio: Share of the tokens of a segment that each merge leaves.
        bounds: Cumulative lengths of the segments within which tokens are merged, from 0 to L.
        prefix: Number of prefix tokens at the start of each segment, which are not merged.
        device: Device of the tokens.
    """

    def __init__(
        self, layers: Sequence[int], ratio: float, bounds: list[int], prefix: int, device: torch.device
    ) -> None:
        self.layers, self.ratio, self.bounds, self.prefix = layers, ratio, bounds, prefix
        self.assignment = torch.arange(bounds[-1], device=device)
        self.sizes = torch.ones(bounds[-1], device=device)
        self.kept_before = torch.arange(bounds[-1] + 1, device=device)
        self.left = self.assignment
        self.assignments: list[Tensor] = []  # after each merge

    def merge(self, hidden_states: Tensor) -> Tensor:
        """Merge `(L, D)` tokens within each segment, and remember which."""
        tokens, sizes, left, assignment = [], [], [], []
        start = 0
        for begin, end in pairwise(self.bounds):
            first = min(begin + self.prefix, end)
            count = count_share(end - first, self.ratio) if end > first else 0
            merged = merge_tokens(hidden_states[first:end], count, self.sizes[first:end])
            tokens += [hidden_states[begin:first], merged.tokens]
            sizes += [self.sizes[begin:first], merged.sizes.float()]
            kept = torch.arange(begin, first, device=self.left.device)
            left += [kept, merged.kept_index + first]
            assignment += [kept - begin + start, merged.assignment + start + first - begin]
            start += first - begin + count
        self.left, self.sizes = torch.cat(left), torch.cat(sizes)
        kept_rows = torch.zeros(len(hidden_states), dtype=torch.int64, device=self.left.device)
        self.kept_before = pad(kept_rows.index_fill(0, self.left, 1).cumsum(0), (1, 0))
        self.assignment = torch.cat(assignment)[self.assignment]
        self.assignments.append(self.assignment)
        self.bounds = self.kept_before[torch.tensor(self.bounds, device=self.left.device)].tolist()
        return torch.cat(tokens)

    def shrink(self, segments: Segments) -> Segments:
        """Return segments of the tokens that the last merge left, with their sizes."""
        cu_seqlens = self.kept_before[segments.cu_seqlens.long()].to(torch.int32)
        bounds = cu_seqlens.tolist()
        longest = max((end - begin for begin, end in pairwise(bounds)), default=0)
        rotary = segments.rotary
        if rotary is not None:
            rotary = rotary[0][self.left], rotary[1][self.left]
        return Segments(cu_seqlens, longest, bounds, rotary, self.sizes.log())

    def restore(self, hidden_states: Tensor) -> Tensor:
        """Return one vector per token of the sequence before all merges."""
        return hidden_states[self.assignment]


def build_merger(
    config: PreTrainedConfig, segments: Segments, options: dict[str, Any], prefix: int = 0
) -> TokenMerger:
    """Build the merger of a forward pass.

    Args:
        config: A configuration with `merge_layers` and `merge_ratio`.
        segments: The segments within which tokens are merged.
        options: Keyword arguments of the encoder.
        prefix: Number of prefix tokens of each segment.

    Raises:
        ValueError: If hidden states or attentions are asked for, which would have several lengths.
    """
    for name in ("output_hidden_states", "output_attentions"):
        if options.get(name):
            raise ValueError(f"`{name}` must not be set with `merge_layers`, after which a layer has fewer tokens.")
    bounds = segments.cu_seqlens.tolist() if segments.cu_seqlens_cpu is None else [*segments.cu_seqlens_cpu]
    return TokenMerger(config.merge_layers, config.merge_ratio, bounds, prefix, segments.cu_seqlens.device)
