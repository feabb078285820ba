"""Projectors that take the patches themselves: each block of m x m becomes one token.

Shapes: L patches of all images in merge order (block after block of m x m), T = L / m^2 tokens, D width of the vision
model, E width of the text model.
"""

from torch import Tensor, nn

from .activations import ExactGELU
from .linear import Linear
from .rms_norm import RMSNorm


class BlockMerger(nn.Module):
    """Normalise each patch, join the patches of a block, and map them by two layers with an exact GELU between them.

    Qwen2.5-VL's merger (arXiv 2502.13923, section 2.1), which openPangu-VL took over.

    Args:
        vision_width: D.
        merge_size: m.
        out_features: Width of the tokens.
        eps: Epsilon of the normalisation.
    """

    def __init__(self, vision_width: int, merge_size: int, out_features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.merged_width = vision_width * merge_size**2
        self.norm = RMSNorm(vision_width, eps)
        self.fc1 = Linear(self.merged_width, self.merged_width)
        self.act_fn = ExactGELU()
        self.fc2 = Linear(self.merged_width, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(L, D)` patches in merge order to `(T, out_features)` tokens."""
        merged = self.norm(features).reshape(-1, self.merged_width)
        return self.fc2(self.act_fn(self.fc1(merged)))


class MultiTapMerger(nn.Module):
    """One merger for each of several layers of a vision model, and the sum of what they give, as in openPangu-VL.

    Args:
        vision_width: D.
        merge_size: m.
        out_features: Width of the tokens.
        taps: Number of layers.
        eps: Epsilon of the normalisations.
    """

    def __init__(self, vision_width: int, merge_size: int, out_features: int, taps: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.mergers = nn.ModuleList([BlockMerger(vision_width, merge_size, out_features, eps) for _ in range(taps)])

    def forward(self, *taps: Tensor) -> Tensor:
        """Map the layers' patches, `(L, D)` each in merge order, to `(T, out_features)` tokens.

        Merger i takes layer i in the order of the vision configuration's `feature_layers`; openPangu-VL's has the last
        layer first.

        Raises:
            ValueError: If there are not as many layers as mergers.
        """
        if len(taps) != len(self.mergers):
            raise ValueError(f"`taps` must hold {len(self.mergers)} layers, one for each merger, got {len(taps)}.")
        tokens = self.mergers[0](taps[0])
        for merger, tap in zip(self.mergers[1:], taps[1:], strict=True):
            tokens = tokens + merger(tap)
        return tokens


class ActivatedLinear(nn.Module):
    """SiLU, then a linear layer: openPangu-VL's last step to the text width.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.fc = Linear(in_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(T, in_features)` to `(T, out_features)`."""
        return self.fc(self.act_fn(features))


class MultiTapProjector(nn.Module):
    """Mergers of several layers, straight to the text width or by way of an inner width.

    Args:
        vision_width: D.
        text_width: E.
        merge_size: m.
        taps: Number of layers.
        hidden_size: Width of the mergers' sum, which an [`ActivatedLinear`] maps to E (3,584 in openPangu-VL-7B); None
            for mergers that give E themselves.
        eps: Epsilon of the normalisations.

    Raises:
        ValueError: If `hidden_size` is not positive.
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        merge_size: int,
        taps: int,
        hidden_size: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if hidden_size is not None and hidden_size < 1:
            raise ValueError(f"`hidden_size` must be at least 1, or None, got {hidden_size}.")
        width = text_width if hidden_size is None else hidden_size
        self.merger = MultiTapMerger(vision_width, merge_size, width, taps, eps)
        self.output = None if hidden_size is None else ActivatedLinear(hidden_size, text_width)

    def forward(self, *taps: Tensor) -> Tensor:
        """Map the layers' patches, `(L, D)` each in merge order, to `(T, E)` tokens."""
        tokens = self.merger(*taps)
        return tokens if self.output is None else self.output(tokens)


def build_patch_merger(
    vision_width: int, text_width: int, merge_size: int, taps: int, eps: float = 1e-6
) -> BlockMerger:
    """A [`BlockMerger`] to the text width.

    Args:
        vision_width: D.
        text_width: E.
        merge_size: m.
        taps: Only 1.
        eps: Epsilon of the normalisation.

    Raises:
        ValueError: If there are several layers.
    """
    if taps != 1:
        raise ValueError(f"The projector 'patch_merger' takes one layer, got `taps`={taps}; see 'multi_tap_merger'.")
    return BlockMerger(vision_width, merge_size, text_width, eps)
