"""Conversion of transformers' ViT."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTModel

from .rules import (
    Conversion,
    Rule,
    check_convolution,
    from_convolution,
    label_fields,
    native_fields,
    pooling_fields,
    refuse_if,
    square_patch_size,
    weight_and_bias,
    zero_bias,
)

SOURCES = (ViTModel, ViTForImageClassification)


def read_vit(source: ViTModel | ViTForImageClassification, pooling: str | None = None) -> Conversion:
    """Determine how a ViT is converted.

    Args:
        source: The model.
        pooling: The requested pooling; None for the class token.

    Raises:
        ValueError: If the model uses an option that NaViT does not have; names it.
    """
    is_classifier = isinstance(source, ViTForImageClassification)
    vit, root = (source.vit, "vit.") if is_classifier else (source, "")
    config = source.config
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    is_wide = head_dim * config.num_attention_heads != config.hidden_size
    refuse_if(is_wide, "head_dim", head_dim, "NaViT's heads add up to `hidden_size`")
    check_convolution(vit.embeddings.patch_embeddings.projection)
    grid = _grid(config)
    rules = dict(_rules(root, config, grid))
    fields = {**native_fields(config, "bicubic"), **pooling_fields(pooling, "class_token", True, 0)}
    if is_classifier and isinstance(source.classifier, nn.Linear):
        rules |= weight_and_bias("classifier", "classifier")
        fields |= label_fields(config)
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return Conversion(
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
        target, source = f"layers.{index}", f"{root}layers.{index}"
        parts = tuple(f"{source}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj"))
        yield from weight_and_bias(f"{target}.norm1", f"{source}.layernorm_before")
        yield from weight_and_bias(f"{target}.self_attn.qkv", *parts, bias=config.qkv_bias)
        if not config.qkv_bias:  # NaViT has all four biases of attention or none.
            yield f"{target}.self_attn.qkv.bias", Rule(tuple(f"{part}.weight" for part in parts), zero_bias)
        yield from weight_and_bias(f"{target}.self_attn.o_proj", f"{source}.attention.o_proj")
        yield from weight_and_bias(f"{target}.norm2", f"{source}.layernorm_after")
        yield from weight_and_bias(f"{target}.mlp.fc1", f"{source}.mlp.fc1")
        yield from weight_and_bias(f"{target}.mlp.fc2", f"{source}.mlp.fc2")
    yield from weight_and_bias("norm", f"{root}layernorm")
