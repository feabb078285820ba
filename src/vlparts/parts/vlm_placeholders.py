"""Placeholder tokens of a text, and the features of images and videos that take their places.

Shapes: B samples, S tokens of a sample, E width of the text model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_placeholders(mask: Tensor, tokens: list[int], kind: str = "image") -> None:
    """Match placeholders and features sample by sample, image by image.

    Args:
        mask: `(B, S)` bool, true at the placeholders.
        tokens: Tokens of each image (or video) of the batch, in order.
        kind: "image" or "video", for the message.

    Raises:
        ValueError: If the images of a sample do not have exactly as many tokens as the sample has placeholders (also
            when the totals of the batch agree); names the sample, the placeholders and the features.
    """
    mismatch = f"{kind.capitalize()} features and {kind} tokens do not match"
    one = f"{'an' if kind == 'image' else 'a'} {kind}"
    items = iter(tokens)
    for sample, placeholders in enumerate(mask.sum(-1).tolist()):
        taken: list[int] = []
        while sum(taken) < placeholders:
            following = next(items, None)
            if following is None:
                break
            taken.append(following)
        if sum(taken) != placeholders:
            raise ValueError(
                f"{mismatch}: sample {sample} has {placeholders} {kind} tokens, but its {kind}s have "
                f"{' + '.join(map(str, taken)) or '0'} features. Was it truncated inside {one}?"
            )
    left_over = list(items)
    if left_over:
        raise ValueError(
            f"{mismatch}: {len(left_over)} {kind}s with {sum(left_over)} features have no {kind} tokens in any of the "
            f"{len(mask)} samples."
        )


def fill_placeholders(inputs_embeds: Tensor, mask: Tensor, features: Sequence[Tensor], kind: str) -> Tensor:
    """Put features in place of placeholders.

    Args:
        inputs_embeds: `(B, S, E)`.
        mask: `(B, S)` bool, true at the placeholders.
        features: `(tokens, E)` of each image (or video) of the batch, in order.
        kind: "image" or "video", for the message.

    Returns:
        `(B, S, E)`.

    Raises:
        ValueError: If they do not match (not checked while compiling).
    """
    if not torch.compiler.is_compiling():
        check_placeholders(mask, [len(tokens) for tokens in features], kind)
    tokens = torch.cat(tuple(features)).to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(mask.unsqueeze(-1), tokens)
