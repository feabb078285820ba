"""The table of parts, and the only caller of the Auto classes' `register`. Importing this file registers all."""

import contextlib
from dataclasses import dataclass, field

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from . import moe  # noqa: F401 (registers the experts implementations)
from .backends import load_backends
from .parts.configuration_deepencoder import DeepEncoderConfig
from .parts.configuration_fused_vision import FusedVisionConfig
from .parts.configuration_moge import MoGEConfig
from .parts.configuration_navit import NaViTConfig
from .parts.configuration_navit_dual_encoder import NaViTDualEncoderConfig
from .parts.configuration_pangu_embedded import PanguEmbeddedConfig
from .parts.configuration_vlm import VisionLanguageConfig
from .parts.configuration_windowfree import WindowFreeViTConfig
from .parts.image_processing_catty import CattyImageProcessor
from .parts.image_processing_deepencoder import DeepEncoderImageProcessor
from .parts.image_processing_navit import NaViTImageProcessor
from .parts.image_processing_windowfree import WindowFreeViTImageProcessor
from .parts.modeling_deepencoder import DeepEncoderModel
from .parts.modeling_fused_vision import FusedVisionModel
from .parts.modeling_moge import MoGEForCausalLM, MoGEModel
from .parts.modeling_navit import NaViTForImageClassification, NaViTModel
from .parts.modeling_navit_dual_encoder import NaViTDualEncoder
from .parts.modeling_pangu_embedded import PanguEmbeddedForCausalLM, PanguEmbeddedModel
from .parts.modeling_vlm import VisionLanguageForConditionalGeneration, VisionLanguageModel
from .parts.modeling_windowfree import WindowFreeViTModel
from .parts.processing_vlm import VisionLanguageProcessor
from .parts.tokenization_coordinates import PaddedCoordinateTokenizer


@dataclass(frozen=True)
class Part:
    """A part and how the Auto classes find it.

    Args:
        config: Configuration class; its `model_type` names the part.
        models: Model classes by the name of their Auto class.
        image_processor: Image processor class on the Pillow backend, if any.
        processor: Processor class, if any.
    """

    config: type[PreTrainedConfig]
    models: dict[str, type[PreTrainedModel]] = field(default_factory=dict)
    image_processor: type[BaseImageProcessor] | None = None
    processor: type[ProcessorMixin] | None = None


PARTS: tuple[Part, ...] = (
    Part(
        NaViTConfig,
        {"AutoModel": NaViTModel, "AutoModelForImageClassification": NaViTForImageClassification},
        image_processor=NaViTImageProcessor,
    ),
    Part(
        NaViTDualEncoderConfig,
        {"AutoModel": NaViTDualEncoder, "AutoModelForZeroShotImageClassification": NaViTDualEncoder},
        image_processor=NaViTImageProcessor,
    ),
    Part(
        WindowFreeViTConfig,
        {"AutoModel": WindowFreeViTModel},
        image_processor=WindowFreeViTImageProcessor,
    ),
    Part(
        DeepEncoderConfig,
        {"AutoModel": DeepEncoderModel},
        image_processor=DeepEncoderImageProcessor,
    ),
    Part(
        FusedVisionConfig,
        {"AutoModel": FusedVisionModel},
        image_processor=CattyImageProcessor,
    ),
    Part(
        PanguEmbeddedConfig,
        {"AutoModel": PanguEmbeddedModel, "AutoModelForCausalLM": PanguEmbeddedForCausalLM},
    ),
    Part(
        MoGEConfig,
        {"AutoModel": MoGEModel, "AutoModelForCausalLM": MoGEForCausalLM},
    ),
    Part(
        VisionLanguageConfig,
        {
            "AutoModel": VisionLanguageModel,
            "AutoModelForMultimodalLM": VisionLanguageForConditionalGeneration,
            "AutoModelForImageTextToText": VisionLanguageForConditionalGeneration,
        },
        image_processor=NaViTImageProcessor,
        processor=VisionLanguageProcessor,
    ),
)


def register_part(part: Part) -> None:
    """Register a part with the Auto classes, for loading here and for travelling as remote code.

    Both are needed: without `register_for_auto_class`, saving writes no code; without `register`, loading here needs
    `trust_remote_code`.
    """
    AutoConfig.register(part.config.model_type, part.config, exist_ok=True)
    part.config.register_for_auto_class()
    for name, model in part.models.items():
        getattr(transformers, name).register(part.config, model, exist_ok=True)
        model.register_for_auto_class(name)
    if part.image_processor is not None:
        # Older transformers' AutoImageProcessor cannot be touched without torchvision; the class itself needs none.
        with contextlib.suppress(ImportError):
            AutoImageProcessor.register(
                part.config, image_processor_classes={"pil": part.image_processor}, exist_ok=True
            )
        part.image_processor.register_for_auto_class()
    if part.processor is not None:
        AutoProcessor.register(part.config, part.processor, exist_ok=True)
        part.processor.register_for_auto_class()


class _TokenizerConfig(PreTrainedConfig):
    """A key for a tokenizer that belongs to no model: AutoTokenizer files classes by configuration and by name."""

    model_type = "vlparts_padded_coordinates"


def register_tokenizers() -> None:
    """Register the tokenizer, for loading here by the name of its class and for travelling as remote code."""
    AutoTokenizer.register(_TokenizerConfig, tokenizer_class=PaddedCoordinateTokenizer, exist_ok=True)
    PaddedCoordinateTokenizer.register_for_auto_class()


def register_all() -> None:
    """Register every part of the table, the tokenizer, the experts implementations and the kernels."""
    for part in PARTS:
        register_part(part)
    register_tokenizers()
    load_backends()


register_all()
