"""Perplexity of texts under a causal language model, and the choice of the texts of lowest perplexity."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ...parts.utils import positive_integer

__all__ = [
    "Perplexity",
    "compute_perplexities",
    "context_length",
    "encode",
    "like_length",
    "score_batch",
    "select_lowest",
]

T = TypeVar("T")
WINDOW = 64
"""Batches that are sorted by length together: more need less padding and more memory."""


class Perplexity(NamedTuple):
    """Perplexity of a text.

    Attributes:
        value: exp(-mean log p) over its tokens; None if there is no token to score.
        tokens: Number of tokens in the mean.
    """

    value: float | None
    tokens: int


def compute_perplexities(
    model: Any, tokenizer: Any, texts: Iterable[str], *, batch_size: int = 8, max_length: int | None = None
) -> list[Perplexity]:
    """Compute the perplexity of texts: exp(-mean log p), as the data filter of POINTS1.5 (arXiv 2412.08443).

    A text is encoded as the tokenizer does by default, without a chat template, and p is the probability of a token
    given those before it. The first token, which may be the tokenizer's beginning of a text, has no probability and is
    not in the mean. Logits are computed for a batch at a time, and probabilities in float32 for a text at a time.

    Args:
        model: A causal language model of transformers in evaluation mode.
        tokenizer: Its tokenizer.
        texts: The texts.
        batch_size: Texts per batch; batches have texts of like length.
        max_length: Only the first `max_length` tokens of a text are scored; None for all.

    Returns:
        One perplexity for each text, in order.

    Raises:
        ValueError: If `batch_size` or `max_length` is not valid, a text is longer than the context of the model and
            `max_length` is None, or a perplexity is not finite.
    """
    positive_integer(batch_size, "batch_size")
    check_max_length(max_length, model)
    found: dict[int, Perplexity] = {}
    encoded = ((index, encode(model, tokenizer, text, max_length)) for index, text in enumerate(texts))
    for batch in like_length(encoded, batch_size, lambda item: len(item[1])):
        for (index, _), one in zip(batch, score_batch(model, [ids for _, ids in batch]), strict=True):
            if one.value is not None and not math.isfinite(one.value):
                raise ValueError(f"`model` must give finite perplexities, got {one.value} for text {index}.")
            found[index] = one
    return [found[index] for index in range(len(found))]


def context_length(model: Any) -> int | None:
    """The largest number of tokens that a model takes; None if its configuration does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_max_length(max_length: int | None, model: Any) -> None:
    """Raise ValueError unless it is None or a number of tokens that can be scored."""
    if max_length is None:
        return
    positive_integer(max_length, "max_length")
    most = context_length(model)
    if max_length < 2 or (most is not None and max_length > most):
        raise ValueError(
            f"`max_length` must be from 2 to the {most or 'number of'} tokens that `model` takes, got {max_length}."
        )


def encode(model: Any, tokenizer: Any, text: str, max_length: int | None) -> list[int]:
    """Return the token ids of a text that are scored.

    Raises:
        ValueError: If there are more than `model` takes and `max_length` is None.
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"] if text else []
    most = context_length(model)
    if max_length is None and most is not None and len(ids) > most:
        raise ValueError(
            f"The text has {len(ids)} tokens, more than the {most} that `model` takes; with `max_length` only its "
            "first tokens are scored."
        )
    return ids[:max_length]


def like_length(items: Iterable[T], batch_size: int, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield batches of items of like length. The items are read a window at a time, longest first in each.

    Args:
        items: The items.
        batch_size: Items per batch; a window has 64 batches.
        length: Returns the length of an item.
    """
    remaining = iter(items)
    while window := sorted(islice(remaining, batch_size * WINDOW), key=length, reverse=True):
        for start in range(0, len(window), batch_size):
            yield window[start : start + batch_size]


@torch.inference_mode()
def score_batch(model: Any, batch: Sequence[Sequence[int]]) -> list[Perplexity]:
    """Compute the perplexities of token ids in one pass of the model.

    Args:
        model: The model.
        batch: Token ids of each text; texts of fewer than two are not scored.
    """
    results = [Perplexity(None, 0)] * len(batch)
    scored = [index for index, ids in enumerate(batch) if len(ids) > 1]
    if not scored:
        return results
    rows = [torch.tensor(batch[index]) for index in scored]
    # Padded on the right, where causal attention does not see it; so the id of padding does not matter.
    inputs = pad_sequence(rows, batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
    for index, ids, row in zip(scored, inputs, logits, strict=True):
        count = len(batch[index]) - 1
        losses = cross_entropy(row[:count].float(), ids[1 : count + 1], reduction="none")
        results[index] = Perplexity(_exp(losses.double().mean().item()), count)
    return results


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def select_lowest(values: Sequence[float] | np.ndarray, keep: float) -> np.ndarray:
    """Return the indices of the lowest values, in increasing order of the indices.

    Args:
        values: n finite values, or NaN for those that do not take part.
        keep: Share of the values to return, in (0, 1]: the `floor(keep * n)` lowest of the n that are not NaN, with
            the product computed exactly from the decimal digits of `keep`. Of equal values the earlier ones are lower.

    Raises:
        ValueError: If `keep` is not in (0, 1].
    """
    check_share(keep)
    values = np.asarray(values, dtype=np.float64)
    taking_part = np.flatnonzero(~np.isnan(values))
    count = math.floor(Fraction(str(keep)) * len(taking_part))
    ranked = taking_part[np.argsort(values[taking_part], kind="stable")]
    return np.sort(ranked[:count])


def check_share(keep: Any) -> None:
    """Raise ValueError unless it is a number in (0, 1]."""
    if not isinstance(keep, (int, float)) or isinstance(keep, bool) or not 0 < keep <= 1:
        raise ValueError(f"`keep` must be a number above 0 and at most 1, got {keep!r}.")
