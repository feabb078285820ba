"""Conversion of the vision tower of transformers' Siglip2 (NaFlex)."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Siglip2ForImageClassification, Siglip2Model, Siglip2VisionModel

from .rules import (
    Conversion,
    Rule,
    from_channels_last,
    label_fields,
    native_fields,
    pooling_fields,
    refuse_if,
    square_patch_size,
    weight_and_bias,
)

SOURCES = (Siglip2VisionModel, Siglip2Model, Siglip2ForImageClassification)


def read_siglip2(source: Any, pooling: str | None = None) -> Conversion:
    """Determine how a Siglip2 vision tower is converted.

    Args:
        source: The vision tower, the dual encoder (whose text tower is left out), or the classifier.
        pooling: The requested pooling; None for the head of the tower ("none" if it has none), or for the mean over
            patches if the source is a classifier.

    Raises:
        ValueError: If the model uses an option that NaViT does not have; names it.
    """
    tower, root = (source, "") if isinstance(source, Siglip2VisionModel) else (source.vision_model, "vision_model.")
    config = tower.config
    side = math.isqrt(config.num_patches)
    refuse_if(side**2 != config.num_patches, "num_patches", config.num_patches, "it must be a square")
    is_classifier = isinstance(source, Siglip2ForImageClassification)
    own = "mean" if is_classifier else "map" if tower.use_head else "none"
    fields = {**native_fields(config, "bilinear_antialias"), **pooling_fields(pooling, own, False, 0)}
    rules = dict(_rules(root, config, side))
    left_out = ["text_model.", "logit_scale", "logit_bias"]
    if tower.use_head and fields["pooling"] == "map":
        rules |= _head_rules(f"{root}head")
    else:
        left_out.append(f"{root}head.")
    if is_classifier and isinstance(source.classifier, nn.Linear):
        rules |= weight_and_bias("classifier", "classifier")
        fields |= label_fields(source.config)
    dropped = ["attention_dropout"] if config.attention_dropout else []
    return Conversion(fields, rules, (side, side), "num_patches", tuple(left_out), dropped)


def _rules(root: str, config: Any, side: int) -> Iterator[tuple[str, Rule]]:
    patches = f"{root}embeddings.patch_embedding"

    def table(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (side, side))

    to_channels_first = partial(from_channels_last, patch_size=square_patch_size(config.patch_size))
    yield "embeddings.patch_embedding.weight", Rule((f"{patches}.weight",), to_channels_first)
    yield "embeddings.patch_embedding.bias", Rule((f"{patches}.bias",))
    yield "embeddings.position_embedding.table", Rule((f"{root}embeddings.position_embedding.weight",), table)
    for index in range(config.num_hidden_layers):
        target, source = f"layers.{index}", f"{root}encoder.layers.{index}"
        parts = tuple(f"{source}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
        yield from weight_and_bias(f"{target}.norm1", f"{source}.layer_norm1")
        yield from weight_and_bias(f"{target}.self_attn.qkv", *parts)
        yield from weight_and_bias(f"{target}.self_attn.o_proj", f"{source}.self_attn.out_proj")
        yield from weight_and_bias(f"{target}.norm2", f"{source}.layer_norm2")
        yield from weight_and_bias(f"{target}.mlp.fc1", f"{source}.mlp.fc1")
        yield from weight_and_bias(f"{target}.mlp.fc2", f"{source}.mlp.fc2")
    yield from weight_and_bias("norm", f"{root}post_layernorm")


def _head_rules(head: str) -> Iterator[tuple[str, Rule]]:
    def probe(probe: Tensor) -> Tensor:
        return probe[0, 0]

    def third(index: int, stacked: Tensor) -> Tensor:
        return stacked.chunk(3)[index]

    yield "pooling.probe", Rule((f"{head}.probe",), probe)
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        yield f"pooling.{name}.weight", Rule((f"{head}.attention.in_proj_weight",), partial(third, index))
        yield f"pooling.{name}.bias", Rule((f"{head}.attention.in_proj_bias",), partial(third, index))
    yield from weight_and_bias("pooling.o_proj", f"{head}.attention.out_proj")
    yield from weight_and_bias("pooling.norm", f"{head}.layernorm")
    yield from weight_and_bias("pooling.fc1", f"{head}.mlp.fc1")
    yield from weight_and_bias("pooling.fc2", f"{head}.mlp.fc2")
