"""Rules: which tensors of another vision transformer become which tensors of a NaViT.

Shapes: D width, P side of a patch, C channels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def concatenate(*tensors: Tensor) -> Tensor:
    """Concatenate tensors along the first axis."""
    return torch.cat(tensors)


def zero_bias(*weights: Tensor) -> Tensor:
    """A bias of zeros for the concatenation of weights `(out, in)`."""
    return torch.cat([weight.new_zeros(weight.shape[0]) for weight in weights])


class Rule(NamedTuple):
    """How one tensor of the NaViT is made.

    Attributes:
        sources: Names of the source's tensors.
        convert: Makes the tensor from them.
    """

    sources: tuple[str, ...]
    convert: Callable[..., Tensor] = concatenate


@dataclass
class Conversion:
    """How one source becomes a NaViT.

    Attributes:
        fields: The fields of `NaViTConfig` that the source decides.
        rules: A rule by name for each tensor of `NaViTModel` that the source has, and for "classifier.weight" and
            "classifier.bias" if the source has a classifier.
        grid: Rows and columns of the position tables; None without tables.
        grid_option: The source's option that sets them.
        left_out: Prefixes of the names of tensors that have no counterpart in NaViT.
        dropped: Options of the source that act in training only and that NaViT does not have.
    """

    fields: dict[str, Any]
    rules: dict[str, Rule]
    grid: tuple[int, int] | None = None
    grid_option: str = ""
    left_out: tuple[str, ...] = ()
    dropped: list[str] = field(default_factory=list)

    @property
    def has_classifier(self) -> bool:
        """Whether the source has a classifier."""
        return "classifier.weight" in self.rules

    def apply(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the NaViT's tensors; none shares memory with the source.

        Args:
            tensors: The source's tensors by name.

        Raises:
            ValueError: If a tensor is missing, or if one is neither used nor left out.
        """
        used = {name for rule in self.rules.values() for name in rule.sources}
        missing = sorted(used - tensors.keys())
        unexpected = sorted(name for name in tensors.keys() - used if not name.startswith(self.left_out))
        if missing or unexpected:
            raise ValueError(
                "`source` must have the tensors of its architecture and no others. "
                f"Missing: {', '.join(missing) or 'none'}. Unexpected: {', '.join(unexpected) or 'none'}."
            )
        return {
            name: rule.convert(*(tensors[source] for source in rule.sources)).clone(
                memory_format=torch.contiguous_format
            )
            for name, rule in self.rules.items()
        }

    def names_left_out(self, tensors: Iterable[str]) -> list[str]:
        """The names among `tensors` that are left out."""
        return sorted(name for name in tensors if name.startswith(self.left_out))


def weight_and_bias(target: str, *sources: str, bias: bool = True) -> Iterator[tuple[str, Rule]]:
    """Rules for the weight and the bias of a linear layer or a normalization.

    Args:
        target: Name of the NaViT's module.
        *sources: Names of the source's modules; the tensors of several are concatenated.
        bias: Whether there are biases.
    """
    yield f"{target}.weight", Rule(tuple(f"{source}.weight" for source in sources))
    if bias:
        yield f"{target}.bias", Rule(tuple(f"{source}.bias" for source in sources))


def from_convolution(weight: Tensor) -> Tensor:
    """Convolution weights `(D, C, P, P)` as `(D, C*P*P)`, the axis order of NaViT's patches."""
    return weight.flatten(1)


def from_channels_last(weight: Tensor, patch_size: int) -> Tensor:
    """Weights `(D, P*P*C)` for channels-last patches as `(D, C*P*P)` for channels-first patches."""
    return weight.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2).flatten(1)


def refuse_if(is_refused: bool, option: str, value: object, reason: str) -> None:
    """Raise ValueError that names an option of the source, if `is_refused`."""
    if is_refused:
        raise ValueError(f"`source` cannot be converted with `{option}` = {value}: {reason}.")


def square_patch_size(patch_size: int | list[int] | tuple[int, int]) -> int:
    """The side of the source's patches.

    Raises:
        ValueError: If they are not square.
    """
    sides = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    refuse_if(sides[0] != sides[1], "patch_size", sides, "patches of NaViT are square")
    return sides[0]


def check_convolution(projection: nn.Conv2d) -> None:
    """Raise ValueError unless the convolution splits an image into adjacent patches."""
    refuse_if(
        projection.stride != projection.kernel_size, "stride", projection.stride, "patches of NaViT do not overlap"
    )
    refuse_if(projection.padding != (0, 0), "padding", projection.padding, "patches of NaViT are not padded")


def native_fields(config: Any, interpolation: str) -> dict[str, Any]:
    """The fields that ViT and Siglip2 have in common.

    Args:
        config: A configuration of transformers.
        interpolation: How the model interpolates its position table.
    """
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": config.num_channels,
        "patch_size": square_patch_size(config.patch_size),
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": True,
        "mlp_bias": True,
        "layer_norm_bias": True,
        "use_qk_norm": False,
        "rotary_theta": None,
        "position_kind": "learned",
        "position_combination": "joint",
        "position_coordinates": "fractional",
        "position_interpolation": interpolation,
    }


def label_fields(config: Any) -> dict[str, Any]:
    """The label fields of a classifier of transformers."""
    return {
        "id2label": dict(config.id2label),
        "label2id": dict(config.label2id),
        "problem_type": config.problem_type,
    }


def pooling_fields(requested: str | None, own: str, has_class_token: bool, registers: int) -> dict[str, Any]:
    """The fields `pooling` and `num_register_tokens`.

    A class token that is not pooled becomes the first register, so that the patch outputs stay the same.

    Args:
        requested: The caller's pooling; None for the source's own.
        own: The source's own pooling.
        has_class_token: Whether the source has a class token.
        registers: Number of registers of the source.

    Raises:
        ValueError: If class-token pooling is requested and the source has no class token.
    """
    pooling = requested or own
    if pooling == "class_token" and not has_class_token:
        raise ValueError(f"`pooling` must not be 'class_token' for a `source` without a class token, got {pooling!r}.")
    kept = has_class_token and pooling != "class_token"
    return {"pooling": pooling, "num_register_tokens": registers + kept}
