"""The recipe for transformers' ViT."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTModel

from ..conversion import (
    Recipe,
    Rule,
    affine,
    check_convolution,
    from_convolution,
    label_fields,
    native_fields,
    pooling_fields,
    refuse_if,
    square_patch_size,
    zero_bias,
)

SOURCES = (ViTModel, ViTForImageClassification)


def read_vit(source: ViTModel | ViTForImageClassification, pooling: str | None = None) -> Recipe:
    """Read what a ViT is made of.

    Args:
        source: The model.
        pooling: The pooling that is wanted; None for the class token.

    Raises:
        ValueError: If the model uses what NaViT does not have; the message names the option.
    """
    is_classifier = isinstance(source, ViTForImageClassification)
    vit, root = (source.vit, "vit.") if is_classifier else (source, "")
    config = source.config
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    is_wide = head_dim * config.num_attention_heads != config.hidden_size
    refuse_if(is_wide, "head_dim", head_dim, "the heads of NaViT add up to `hidden_size`")
    check_convolution(vit.embeddings.patch_embeddings.projection)
    grid = _grid(config)
    rules = dict(_rules(root, config, grid))
    fields = {**native_fields(config, "bicubic"), **pooling_fields(pooling, "class_token", True, 0)}
    if is_classifier and isinstance(source.classifier, nn.Linear):
        rules |= affine("classifier", "classifier")
        fields |= label_fields(config)
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return Recipe(
        fields,
        rules,
        grid,
        "image_size",
        left_out=(f"{root}pooler.", f"{root}embeddings.mask_token"),
        dropped=[name for name in rates if getattr(config, name)],
    )


def _grid(config: Any) -> tuple[int, int]:
    size, side = config.image_size, square_patch_size(config.patch_size)
    height, width = (size, size) if isinstance(size, int) else size
    return height // side, width // side


def _rules(root: str, config: Any, grid: tuple[int, int]) -> Iterator[tuple[str, Rule]]:
    patches, positions = f"{root}embeddings.patch_embeddings.projection", f"{root}embeddings.position_embeddings"

    def table(positions: Tensor) -> Tensor:
        return positions[0, 1:].unflatten(0, grid)

    def class_token(token: Tensor, positions: Tensor) -> Tensor:
        return token[0] + positions[0, :1]

    yield "embeddings.patch_embedding.weight", Rule((f"{patches}.weight",), from_convolution)
    yield "embeddings.patch_embedding.bias", Rule((f"{patches}.bias",))
    yield "embeddings.position_embedding.table", Rule((positions,), table)
    yield "prefix.tokens", Rule((f"{root}embeddings.cls_token", positions), class_token)
    for index in range(config.num_hidden_layers):
        here, there = f"layers.{index}", f"{root}layers.{index}"
        parts = tuple(f"{there}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj"))
        yield from affine(f"{here}.norm1", f"{there}.layernorm_before")
        yield from affine(f"{here}.self_attn.qkv", *parts, bias=config.qkv_bias)
        if not config.qkv_bias:  # NaViT has all four biases of attention or none.
            yield f"{here}.self_attn.qkv.bias", Rule(tuple(f"{part}.weight" for part in parts), zero_bias)
        yield from affine(f"{here}.self_attn.o_proj", f"{there}.attention.o_proj")
        yield from affine(f"{here}.norm2", f"{there}.layernorm_after")
        yield from affine(f"{here}.mlp.fc1", f"{there}.mlp.fc1")
        yield from affine(f"{here}.mlp.fc2", f"{there}.mlp.fc2")
    yield from affine("norm", f"{root}layernorm")
