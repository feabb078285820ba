"""Samples packed in rows of tokens: where they start, and text models that compute each as if it were alone.

Shapes: B rows, S tokens per row, n samples, E width.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel

from .ops_attention import PACKED_ATTENTION_NAME
from .utils import check_shape, server_of

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens_cpu")
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def positions_in_samples(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the position of each token in its sample, `(1, S)` int64.

    Args:
        cu_seqlens: `(n + 1,)` cumulative lengths of the samples, from 0 to S.
        tokens: S.
    """
    index = torch.arange(tokens, device=cu_seqlens.device)
    ends = cu_seqlens[1:].long()
    return (index - cu_seqlens.long()[torch.bucketize(index, ends, right=True)]).unsqueeze(0)


def find_samples(
    shape: torch.Size,
    attention_mask: Any,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
    boundaries: Sequence[int] | None,
) -> Tensor | None:
    """Find the samples in rows that hold several, from given boundaries or from positions that restart at 0.

    Args:
        shape: B and S.
        attention_mask: `(B, past + S)`, 0 at padding. A prepared mask takes the place of positions that restart.
        position_ids: `(B, S)`, `(1, S)` or `(4, B, S)`, whose first axis is the position in the text.
        past_key_values: Cache.
        use_cache: True if a cache is requested.
        boundaries: `n + 1` cumulative lengths of the samples of one row.

    Returns:
        `(B, S)` int64, the index of each token's sample among all of the batch, -1 at padding; None if each row is
        one sample.

    Raises:
        ValueError: If the boundaries do not fit the tokens, or rows of several samples have another mask or a cache.
    """
    rows, tokens = shape
    past = 0 if past_key_values is None else _cached_tokens(past_key_values)
    is_padding_mask = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    if boundaries is None and attention_mask is not None and not is_padding_mask:
        return None  # a prepared mask says which tokens attend to which; positions also restart at its padding
    attended = attention_mask[:, past : past + tokens] != 0 if is_padding_mask else None
    if attended is not None and attended.shape != shape:
        return None  # an error of the text model
    if boundaries is not None and (len(boundaries) > 2 or not past):
        if rows != 1 or boundaries[0] != 0 or boundaries[-1] != tokens or sorted(boundaries) != list(boundaries):
            raise ValueError(
                f"`cu_seq_lens_q` must rise from 0 to the number of tokens of one row, got {list(boundaries)} for "
                f"{rows} rows of {tokens} tokens."
            )
        if attended is not None and not attended.all():
            raise ValueError("`attention_mask` must be all ones, or absent, with `cu_seq_lens_q`, got zeros.")
        starts = torch.zeros(shape, dtype=torch.bool)
        starts[0, [bound for bound in boundaries if bound < tokens]] = True
    else:
        if position_ids is not None and position_ids.ndim == 3 and len(position_ids) == 4:
            position_ids = position_ids[0]
        if position_ids is None or position_ids.shape not in (shape, (1, tokens)):
            return None
        starts = (position_ids == 0).expand(shape)
        if attended is not None:
            starts = starts & attended
        # Whatever their position, the first tokens of rows are starts.
        starts = starts | (torch.arange(tokens, device=starts.device) == 0 if attended is None else _first(attended))
    if not bool((starts.sum(-1) > 1).any()):
        return None
    if past or use_cache:
        raise ValueError(
            "`use_cache` must be False, and `past_key_values` empty, for rows of several samples (`cu_seq_lens_q`, or "
            "`position_ids` that restart at 0), since a cache does not keep samples apart. Give each sample a row."
        )
    if attention_mask is not None and not is_padding_mask:
        raise ValueError(
            "`attention_mask` must be absent, or have shape (samples, tokens), with `cu_seq_lens_q`, got another mask."
        )
    ids = starts.flatten().cumsum(0).sub(1).view(shape)
    return ids if attended is None else ids.to(attended.device).masked_fill(~attended, -1)


def sequence_bounds(
    shape: tuple[int, int],
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
) -> Tensor:
    """Find where the sequences of a batch begin and end: its samples, or its rows if each is one sample.

    Args:
        shape: B and S.
        attention_mask: `(B, past + S)`, 0 at padding, or a prepared mask, as given to the text model.
        position_ids: As given to the text model.
        cu_seq_lens_q: `(n + 1,)` boundaries of the samples of one row, as given to the text model.

    Returns:
        `(n + 1,)` cumulative lengths over all B * S tokens, row after row. Padding is in the sequence before it, or
        in the first.

    Raises:
        ValueError: As [`find_samples`].
    """
    rows, tokens = shape
    if torch.compiler.is_compiling():  # as `run_text_model`, which cannot look for samples either
        ids = None
        if cu_seq_lens_q is not None:
            return cu_seq_lens_q
    else:
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, -tokens:]
        bounds = None if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        ids = find_samples(torch.Size(shape), attention_mask, position_ids, None, None, bounds)
    if ids is None:
        return torch.arange(rows + 1) * tokens
    lengths = ids.flatten().cummax(0).values.clamp_min(0).bincount()
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _first(attended: Tensor) -> Tensor:
    return attended & (attended.cumsum(-1) == 1)


def _cached_tokens(cache: Cache) -> int:
    try:
        return int(cache.get_seq_length())
    except ValueError:  # a cache of linear attention alone does not tell
        return 0


def _reads_boundaries(text_model: PreTrainedModel) -> bool:
    """Whether all layers of a text model keep the samples of `cu_seq_lens_q` apart by themselves."""
    config = text_model.config
    implementation = str(config._attn_implementation)
    layers = set(getattr(config, "layer_types", None) or ())
    return (
        (implementation == PACKED_ATTENTION_NAME or "flash" in implementation)
        and text_model._supports_attention_backend
        and not text_model._is_stateful  # linear attention and the like
        and layers <= _PLAIN_LAYERS
        and config.model_type != "doge"  # its layers add to the mask, which packed attention does not read
    )


def run_text_model(
    forward: Callable[..., Any],
    text_model: PreTrainedModel,
    *,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run any causal text model such that samples of one row do not attend to one another.

    Text models whose layers read `cu_seq_lens_q` get the row as it is, and so do those that a server runs: its
    attention keeps the requests of a row apart. For all others each sample becomes a row of its own, padded on the
    right, which no earlier token of a causal model attends to.

    Args:
        forward: Forward pass of the text model.
        text_model: The text model, without its head.
        attention_mask: `(B, S)`, 0 at padding, or what else the text model takes.
        position_ids: `(B, S)` or `(axes, B, S)`. Absent with `cu_seq_lens_q`, they count from 0 in each sample.
        past_key_values: Cache.
        use_cache: Whether to return a cache. None for the text model's default, and False for several samples per row.
        **kwargs: `input_ids` `(B, S)` or `inputs_embeds` `(B, S, E)`, `cu_seq_lens_q` `(n + 1,)`, and further
            arguments of the text model.

    Returns:
        The text model's output, with all its tensors in the layout of the inputs.

    Raises:
        ValueError: As [`find_samples`], or if attention weights of several samples per row are requested.
    """
    inputs = {name: kwargs.pop(name) for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None}
    sequence, cu_seqlens = next(iter(inputs.values()), None), kwargs.get("cu_seq_lens_q")
    state: dict[str, Any] = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "use_cache": use_cache,
    }
    if sequence is None or sequence.ndim < 2 or sequence.shape[1] < 2 or server_of(text_model.config):
        return forward(**inputs, **state, **kwargs)
    compiled = torch.compiler.is_compiling()
    ids = None
    if not compiled:
        if cu_seqlens is not None:
            check_shape("cu_seq_lens_q", cu_seqlens, None)
        bounds = None if cu_seqlens is None else kwargs.get("cu_seqlens_cpu") or cu_seqlens.tolist()
        ids = find_samples(sequence.shape[:2], **state, boundaries=bounds)
    if cu_seqlens is not None and (_reads_boundaries(text_model) if ids is not None else compiled):
        if position_ids is None:
            state["position_ids"] = positions_in_samples(cu_seqlens, sequence.shape[1])
        state |= {"attention_mask": None, "use_cache": False}
    elif ids is not None:
        return _run_in_rows(forward, text_model, inputs, position_ids, ids, kwargs)
    return forward(**inputs, **state, **kwargs)


def keep_samples_apart(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the forward pass of a text model, so that it runs as in [`run_text_model`]."""
    signature = inspect.signature(forward)

    @wraps(forward)
    def apart(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        names = list(signature.parameters)[1 : len(args) + 1]
        given = dict(zip(names, args, strict=True))
        return run_text_model(partial(forward, self), self, **given, **kwargs)

    return apart


def _run_in_rows(
    forward: Callable[..., Any],
    text_model: PreTrainedModel,
    inputs: dict[str, Tensor],
    position_ids: Tensor | None,
    ids: Tensor,
    kwargs: dict[str, Any],
) -> Any:
    """Run each sample as a row of its own."""
    if kwargs.get("output_attentions") or getattr(text_model.config, "output_attentions", False):
        raise ValueError("`output_attentions` must be False for rows of several samples, got True.")
    kwargs = {name: value for name, value in kwargs.items() if name not in _BOUNDARIES}
    tokens = (ids.flatten() >= 0).nonzero().squeeze(1)
    sample = ids.flatten()[tokens]
    lengths = torch.bincount(sample)
    place = torch.arange(len(sample), device=ids.device) - (lengths.cumsum(0) - lengths)[sample]
    rows = torch.Size((len(lengths), int(lengths.max())))

    def unpack(tensor: Tensor) -> Tensor:
        """From `(B, S, ...)` to `(n, longest, ...)`, 0 at padding."""
        at = [index.to(tensor.device) for index in (sample, place, tokens)]
        values = tensor.flatten(0, 1)[at[2]]
        return tensor.new_zeros(*rows, *tensor.shape[2:]).index_put(tuple(at[:2]), values)

    def pack(value: Any) -> Any:
        """Back to `(B, S, ...)`, in all tensors with a value per token."""
        if isinstance(value, tuple | list):
            return tuple(pack(one) for one in value)
        if not isinstance(value, Tensor):
            return value
        if value.shape[:2] != rows:
            is_flat = value.shape[:1] == (rows.numel(),)  # router logits
            return pack(value.unflatten(0, rows)).flatten(0, 1) if is_flat else value
        at = [index.to(value.device) for index in (sample, place, tokens)]
        packed = value.new_zeros(ids.numel(), *value.shape[2:]).index_put((at[2],), value[at[0], at[1]])
        return packed.unflatten(0, ids.shape)

    if position_ids is not None:
        axes = position_ids.expand(*position_ids.shape[:-2], *ids.shape).reshape(-1, *ids.shape)
        position_ids = torch.stack([unpack(axis) for axis in axes]).view(*position_ids.shape[:-2], *rows)
    mask = unpack(torch.ones_like(ids))
    outputs = forward(
        **{name: unpack(value) for name, value in inputs.items()},
        attention_mask=None if mask.all() else mask,
        position_ids=position_ids,
        use_cache=False,
        **{**kwargs, "return_dict": True},
    )
    for name, value in outputs.items():
        outputs[name] = pack(value)
    return outputs
