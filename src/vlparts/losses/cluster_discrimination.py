"""Multi-label cluster discrimination (MLCD): a contrastive loss of images against cluster centres.

The loss is that of MLCD (arXiv 2407.17331); the object and text region losses of RICE (arXiv 2507.20025) have the same
form. openPangu-VL's encoder was probably trained with it: a tool of its maker calls the encoder RICE-600M, but the
training loss is not published.

Shapes: n images, D features, K centres, P maximum number of labels per image, c chunk size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..parts.utils import positive_integer
from ._checks import check_number

__all__ = ["DEFAULT_CENTER_CHUNK_SIZE", "multi_label_cluster_loss", "sample_negative_centers"]

DEFAULT_CENTER_CHUNK_SIZE = 16384


def multi_label_cluster_loss(
    features: Tensor,
    centers: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.0,
    negatives: Tensor | None = None,
    chunk_size: int = DEFAULT_CENTER_CHUNK_SIZE,
) -> Tensor:
    """Compute the mean over images of `log(1 + sum_neg exp(s_j)) + log(1 + sum_pos exp(-s_i))` (arXiv 2407.17331).

    Here `s_i = scale * (cos(feature, centre_i) - margin)` for the labels of an image, and
    `s_j = scale * cos(feature, centre_j)` for the other centres. The margin is that of CosFace (arXiv 1801.09414); the
    paper's formula has `margin=0`. The scale of MLCD is not published: the default is CosFace's.

    The loss is computed in float32 (float64 for float64 inputs), also under autocast, in chunks of c centres that
    backward recomputes. It reads the values of `labels` and `negatives`, so it waits for the device.

    Args:
        features: `(n, D)` floating point; normalised here. A row of zeros has cosine 0.
        centers: `(K, D)` floating point; normalised here.
        labels: `(n, P)` int64, the centres of each image, padded with -1. Repeated labels of an image count once. An
            image without labels has no positive term.
        scale: Factor of the cosines, above 0.
        margin: Subtracted from the cosines of the labels, at least 0.
        negatives: `(M,)` int64, distinct centres to use as negatives; None for all. The labels of an image are its
            positives, and never its negatives, whether they are listed here or not. See [`sample_negative_centers`].
        chunk_size: Number c of centres whose scores `(n, c)` are held at a time.

    Returns:
        The loss, of shape `()`.

    Raises:
        ValueError: If a shape, type or value does not fit this description, or there is no image.
    """
    _check_features(features, centers)
    _check_labels(labels, len(features), len(centers))
    check_number(scale, "scale", positive=True)
    check_number(margin, "margin")
    chunk_size = positive_integer(chunk_size, "chunk_size")
    if negatives is None:
        pool, ids = centers, torch.arange(len(centers), device=labels.device)
    else:
        _check_negatives(negatives, len(centers))
        pool, ids = centers[negatives], negatives
    dtype = torch.promote_types(torch.promote_types(features.dtype, centers.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        scaled = F.normalize(features.to(dtype), dim=-1) * scale
        # Zeros are the logarithm of the 1 in the formula, so no log-sum-exp is empty.
        negative = scaled.new_zeros(len(features))
        for chunk, chunk_ids in zip(pool.split(chunk_size), ids.split(chunk_size), strict=True):
            negative = checkpoint(_add_negatives, negative, scaled, chunk, chunk_ids, labels, use_reentrant=False)
        return (negative + _positive_term(scaled, centers, labels, scale * margin)).mean()


def sample_negative_centers(
    labels: Tensor, num_centers: int, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Sample the centres of one step: the labels of the batch and random others (Partial FC, arXiv 2203.15565).

    MLCD samples a tenth of its million centres, since a larger sample has more false negatives (arXiv 2407.17331).

    Args:
        labels: `(n, P)` int64, padded with -1.
        num_centers: Number K of centres.
        count: Number of centres to sample, between 1 and K. If the batch has more distinct labels, exactly those are
            returned.
        generator: Random number generator on the device of `labels`; None for the default one.

    Returns:
        `(max(count, number of distinct labels),)` int64, distinct and ascending.

    Raises:
        ValueError: If `labels` do not fit this description, or `count` is not between 1 and K.
    """
    num_centers = positive_integer(num_centers, "num_centers")
    _check_labels(labels, len(labels), num_centers)
    if positive_integer(count, "count") > num_centers:
        raise ValueError(f"`count` must be at most `num_centers`={num_centers}, got {count}.")
    positives = labels[labels >= 0].unique()
    order = torch.rand(num_centers, generator=generator, device=labels.device)
    order[positives] = 2.0
    return order.topk(max(count, len(positives))).indices.sort().values


def _add_negatives(total: Tensor, scaled: Tensor, centers: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Add the exponentials of a chunk's scores to log-sums `(n,)`."""
    with torch.autocast(scaled.device.type, enabled=False):
        scores = scaled @ F.normalize(centers.to(scaled.dtype), dim=-1).T
        is_label = torch.zeros_like(scores, dtype=torch.bool)
        for column in labels.unbind(1):
            is_label |= column[:, None] == ids
        scores = scores.masked_fill_(is_label, -torch.inf)
        return torch.cat([total[:, None], scores], dim=1).logsumexp(dim=1)


def _positive_term(scaled: Tensor, centers: Tensor, labels: Tensor, shift: float) -> Tensor:
    """Compute `log(1 + sum_pos exp(-s_i))` of each image, `(n,)`."""
    ordered = labels.sort(dim=1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    positives = F.normalize(centers[ordered.clamp(min=0)].to(scaled.dtype), dim=-1)
    scores = shift - torch.einsum("nd,npd->np", scaled, positives)
    scores = scores.masked_fill(repeated | (ordered < 0), -torch.inf)
    return torch.cat([scores.new_zeros(len(scores), 1), scores], dim=1).logsumexp(dim=1)


def _check_features(features: Tensor, centers: Tensor) -> None:
    for name, tensor in (("features", features), ("centers", centers)):
        if tensor.ndim != 2 or not tensor.is_floating_point() or len(tensor) == 0:
            raise ValueError(
                f"`{name}` must be floating point with shape (rows, width) and at least one row, got {tensor.dtype} "
                f"with {tuple(tensor.shape)}."
            )
    if features.shape[1] != centers.shape[1]:
        raise ValueError(
            f"`features` and `centers` must have the same width, got {features.shape[1]} and {centers.shape[1]}."
        )


def _check_labels(labels: Tensor, num_images: int, num_centers: int) -> None:
    if labels.dtype != torch.int64 or labels.ndim != 2 or len(labels) != num_images:
        raise ValueError(
            f"`labels` must be int64 with shape ({num_images}, labels), got {labels.dtype} with {tuple(labels.shape)}."
        )
    if labels.numel() and (labels.min() < -1 or labels.max() >= num_centers):
        raise ValueError(
            f"`labels` must be between -1 (padding) and {num_centers - 1}, got values from {labels.min().item()} to "
            f"{labels.max().item()}."
        )


def _check_negatives(negatives: Tensor, num_centers: int) -> None:
    if negatives.dtype != torch.int64 or negatives.ndim != 1:
        raise ValueError(
            f"`negatives` must be int64 with shape (count,), got {negatives.dtype} with {tuple(negatives.shape)}."
        )
    if negatives.numel() and (negatives.min() < 0 or negatives.max() >= num_centers):
        raise ValueError(
            f"`negatives` must be between 0 and {num_centers - 1}, got values from {negatives.min().item()} to "
            f"{negatives.max().item()}."
        )
    distinct = len(negatives.unique())
    if distinct != len(negatives):
        raise ValueError(f"`negatives` must be distinct, got {len(negatives)} of which {distinct} are distinct.")
