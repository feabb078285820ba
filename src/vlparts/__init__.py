"""Reusable vision-language parts for Hugging Face transformers.

Importing the package registers every part with transformers' Auto classes.
"""

from .backends import load_backends
from .composition import compose, compose_processor
from .parts.configuration_navit import NaViTConfig
from .parts.configuration_navit_dual_encoder import NaViTDualEncoderConfig
from .parts.configuration_vlm import VisionLanguageConfig
from .parts.image_processing_navit import NaViTImageProcessor
from .parts.modeling_navit import NaViTForImageClassification, NaViTModel
from .parts.modeling_navit_dual_encoder import NaViTDualEncoder
from .parts.modeling_vlm import VisionLanguageForConditionalGeneration, VisionLanguageModel
from .parts.processing_vlm import VisionLanguageProcessor
from .registration import register_all

__version__ = "0.1.0"

__all__ = [
    "NaViTConfig",
    "NaViTDualEncoder",
    "NaViTDualEncoderConfig",
    "NaViTForImageClassification",
    "NaViTImageProcessor",
    "NaViTModel",
    "VisionLanguageConfig",
    "VisionLanguageForConditionalGeneration",
    "VisionLanguageModel",
    "VisionLanguageProcessor",
    "compose",
    "compose_processor",
]

register_all()
load_backends()
