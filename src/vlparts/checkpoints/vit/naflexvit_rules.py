"""Rules for the tensors of timm's NaFlexVit.

Shapes: D width, P side of a patch, C channels, K prefix tokens of one kind.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .rules import (
    Rule,
    check_convolution,
    concatenate,
    from_channels_last,
    from_convolution,
    weight_and_bias,
    zero_bias,
)

Rules = Iterator[tuple[str, Rule]]


def embedding_rules(embeds: Any) -> Rules:
    """Rules for patch embedding, position embeddings and prefix tokens."""
    to_channels_first: Callable[..., Tensor] = concatenate
    if not embeds.is_linear:
        check_convolution(embeds.proj)
        to_channels_first = from_convolution
    elif embeds.channels_last:
        to_channels_first = partial(from_channels_last, patch_size=embeds.patch_size[0])
    yield "embeddings.patch_embedding.weight", Rule(("embeds.proj.weight",), to_channels_first)
    yield "embeddings.patch_embedding.bias", Rule(("embeds.proj.bias",))
    if embeds.pos_embed_type == "learned":
        yield "embeddings.position_embedding.table", Rule(("embeds.pos_embed",), _unbatched)
    elif embeds.pos_embed_type == "factorized":
        yield "embeddings.position_embedding.row", Rule(("embeds.pos_embed_y",), _unbatched)
        yield "embeddings.position_embedding.column", Rule(("embeds.pos_embed_x",), _unbatched)
    tokens = {"embeds.cls_token": embeds.cls_token, "embeds.reg_token": embeds.reg_token}
    names = tuple(name for name, token in tokens.items() if token is not None)
    if names:
        yield "prefix.tokens", Rule(names, _unbatched)


def block_rules(target: str, source: str, block: Any, fields: dict[str, Any]) -> Rules:
    """Rules for one block; LayerScale is multiplied into the layer before it.

    Args:
        target: Name of NaViT's layer.
        source: Name of the source's block.
        block: The block.
        fields: Fields of `NaViTConfig`, which say what biases and normalizations there are.
    """
    attention, mlp, has_bias = block.attn, block.mlp, fields["layer_norm_bias"]
    scales = [None if isinstance(scale, nn.Identity) else scale for scale in (block.ls1, block.ls2)]
    gammas = [None if scale is None else f"{source}.ls{index}.gamma" for index, scale in enumerate(scales, 1)]
    yield from weight_and_bias(f"{target}.norm1", f"{source}.norm1", bias=has_bias)
    yield from _linear(f"{target}.self_attn.qkv", f"{source}.attn.qkv", attention.qkv, fields["qkv_bias"])
    yield from _linear(
        f"{target}.self_attn.o_proj", f"{source}.attn.proj", attention.proj, fields["qkv_bias"], gammas[0]
    )
    yield from weight_and_bias(f"{target}.norm2", f"{source}.norm2", bias=has_bias)
    yield from _linear(f"{target}.mlp.fc1", f"{source}.mlp.fc1", mlp.fc1, fields["mlp_bias"])
    yield from _linear(f"{target}.mlp.fc2", f"{source}.mlp.fc2", mlp.fc2, fields["mlp_bias"], gammas[1])
    if fields["use_qk_norm"]:
        yield from weight_and_bias(f"{target}.self_attn.q_norm", f"{source}.attn.q_norm", bias=False)
        yield from weight_and_bias(f"{target}.self_attn.k_norm", f"{source}.attn.k_norm", bias=False)


def attention_pooling_rules(head: Any) -> Rules:
    """Rules for the attention pooling `attn_pool`."""
    yield "pooling.probe", Rule(("attn_pool.latent",), lambda latent: latent[0, 0])
    yield from weight_and_bias("pooling.q_proj", "attn_pool.q")
    for index, name in enumerate(("k_proj", "v_proj")):
        for kind in ("weight", "bias"):
            yield f"pooling.{name}.{kind}", Rule((f"attn_pool.kv.{kind}",), partial(_half, index))
    yield from weight_and_bias("pooling.o_proj", "attn_pool.proj")
    yield from _linear("pooling.norm", "attn_pool.norm", head.norm, has_bias=True)
    yield from weight_and_bias("pooling.fc1", "attn_pool.mlp.fc1")
    yield from weight_and_bias("pooling.fc2", "attn_pool.mlp.fc2")


def _linear(target: str, source: str, layer: Any, has_bias: bool, gamma: str | None = None) -> Rules:
    """Rules for weight and bias, multiplied by `gamma`; a missing bias becomes zero."""
    scale = () if gamma is None else (gamma,)
    convert: Callable[..., Tensor] = concatenate if gamma is None else _scaled
    yield f"{target}.weight", Rule((f"{source}.weight", *scale), convert)
    if has_bias and layer.bias is None:
        yield f"{target}.bias", Rule((f"{source}.weight",), zero_bias)
    elif has_bias:
        yield f"{target}.bias", Rule((f"{source}.bias", *scale), convert)


def _scaled(tensor: Tensor, gamma: Tensor) -> Tensor:
    """Multiply the rows of a weight `(D, in)` or bias `(D,)` by gamma `(D,)`."""
    return tensor * gamma.unflatten(0, (-1, *[1] * (tensor.ndim - 1)))


def _half(index: int, stacked: Tensor) -> Tensor:
    return stacked.chunk(2)[index]


def _unbatched(*tensors: Tensor) -> Tensor:
    """Concatenate tensors `(1, K, ...)` along K, without the first axis."""
    return torch.cat([tensor[0] for tensor in tensors])
