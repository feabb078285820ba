"""Configuration of two vision encoders that see the same images."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .utils import NamedPresets, check_minimum
from .vlm_towers import VISION_TOWERS, leave_out_unused, vision_width

_FIELDS = ("general_config", "ocr_config")
_SQUARE = tuple(kind for kind, tower in VISION_TOWERS.items() if tower.layout == "square")


@strict
class FusedVisionConfig(NamedPresets, PreTrainedConfig):
    """Configuration of [`FusedVisionModel`]: two native vision encoders of images of one size (arXiv 2409.04828).

    The defaults are those of POINTS1.0, also the preset "points_1_0": two of CLIP's large encoder, for images of 336
    pixels and patches of 14.

    Args:
        general_config: Configuration of the first encoder, in POINTS1.0 the one of general images; a dictionary needs
            a "model_type".
        ocr_config: Configuration of the second encoder, in POINTS1.0 the one of texts in images; the default is that
            of the first.
        feature_layers: Of each of the two, -1 for the encoder's output, otherwise an index into its hidden states.
            POINTS1.0 takes those before the last layer.
        spatial_merge_size: Side m of the block of patches that the projector merges into one token.
    """

    model_type = "vlparts_fused_vision"
    named_presets = {"points_1_0": {}}
    base_config_key = "vision_config"
    sub_configs = {"general_config": AutoConfig, "ocr_config": AutoConfig}

    general_config: dict | PreTrainedConfig | None = None
    ocr_config: dict | PreTrainedConfig | None = None
    feature_layers: list[int] | tuple[int, ...] = (-2, -2)
    spatial_merge_size: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.general_config is None:
            self.general_config = {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
            }
        self.general_config = _resolve(self.general_config, "general_config")
        given = self.general_config.to_dict() if self.ocr_config is None else self.ocr_config
        self.ocr_config = _resolve(given, "ocr_config")
        self.feature_layers = list(self.feature_layers)  # JSON has no tuples
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width D of the features of each encoder."""
        return vision_width(self.general_config, self.feature_layers[0])

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of both encoders, which `attentions` are of."""
        return int(self.general_config.num_hidden_layers + self.ocr_config.num_hidden_layers)

    @property
    def num_attention_heads(self) -> int:
        """Number of heads of the first encoder."""
        return int(self.general_config.num_attention_heads)

    @property
    def image_size(self) -> Any:
        """Side of the images in pixels, or height and width."""
        return self.general_config.image_size

    @property
    def patch_size(self) -> Any:
        """Side in pixels of the square that each feature covers, or height and width."""
        return VISION_TOWERS[self.general_config.model_type].stride(self.general_config)

    def validate_architecture(self) -> None:
        """Check that both encoders give as many features of one width.

        Raises:
            ValueError: If `spatial_merge_size` is not positive, there are not two feature layers, an encoder has no
                such layer, or the encoders differ in image size, patches or width.
        """
        check_minimum(self, 1, "spatial_merge_size")
        if len(self.feature_layers) != len(_FIELDS):
            raise ValueError(f"`feature_layers` must hold one layer per encoder, 2, got {self.feature_layers}.")
        facts = []
        for name, layer in zip(_FIELDS, self.feature_layers, strict=True):
            config = getattr(self, name)
            layers = getattr(config, "num_hidden_layers", None)
            if layers is not None and not -layers - 1 <= layer <= layers:
                raise ValueError(
                    f"`feature_layers` must be from {-layers - 1} to {layers} for `{name}`, got {self.feature_layers}."
                )
            stride = VISION_TOWERS[config.model_type].stride(config)
            facts.append([*map(_pair, (config.image_size, stride)), vision_width(config, layer)])
        if facts[0] != facts[1]:
            raise ValueError(
                "`ocr_config` must have the image size, the patch size and the width of the features of "
                f"`general_config`, {facts[0]}, got {facts[1]}."
            )


def _resolve(config: dict[str, Any] | PreTrainedConfig, argument: str) -> PreTrainedConfig:
    """Return a field as a configuration, without modules that are not used."""
    kind = config.get("model_type") if isinstance(config, dict) else config.model_type
    if kind not in _SQUARE:
        raise ValueError(
            f"`{argument}` must be that of a native vision encoder of images of one size, of type "
            f"{', '.join(sorted(_SQUARE))}, got {kind!r}."
        )
    return leave_out_unused(CONFIG_MAPPING[kind](**config) if isinstance(config, dict) else config)


def _pair(side: Any) -> list[int]:
    return [side, side] if isinstance(side, int) else list(side)


__all__ = ["FusedVisionConfig"]
