"""Reusable vision-language parts for Hugging Face transformers.

Importing the package registers every part with transformers' Auto classes.
"""

from . import _first_imports as first_imports  # noqa: F401 (before all others: it names a broken torch_npu)
from .backends import load_backends
from .composition import compose, compose_processor
from .generation.constrained_coordinates import CoordinateLogitsProcessor
from .losses.cluster_discrimination import multi_label_cluster_loss, sample_negative_centers
from .losses.cross_entropy import weighted_cross_entropy
from .losses.linear_cross_entropy import linear_weighted_cross_entropy
from .losses.normalizer import LossNormalizer
from .moe import RouterStatistics, set_experts_implementation
from .parts.configuration_moge import MoGEConfig
from .parts.configuration_navit import NaViTConfig
from .parts.configuration_navit_dual_encoder import NaViTDualEncoderConfig
from .parts.configuration_pangu_embedded import PanguEmbeddedConfig
from .parts.configuration_vlm import VisionLanguageConfig
from .parts.configuration_windowfree import WindowFreeViTConfig
from .parts.coordinate_tokens import CoordinateTokenIds, LocationTokens
from .parts.image_processing_navit import NaViTImageProcessor
from .parts.image_processing_windowfree import WindowFreeViTImageProcessor
from .parts.modeling_moge import MoGEForCausalLM, MoGEModel
from .parts.modeling_navit import NaViTForImageClassification, NaViTModel
from .parts.modeling_navit_dual_encoder import NaViTDualEncoder
from .parts.modeling_pangu_embedded import PanguEmbeddedForCausalLM, PanguEmbeddedModel
from .parts.modeling_vlm import VisionLanguageForConditionalGeneration, VisionLanguageModel
from .parts.modeling_windowfree import WindowFreeViTModel
from .parts.moe_losses import balance_loss, router_z_loss
from .parts.moe_router import GroupedTopKRouter
from .parts.processing_vlm import VisionLanguageProcessor
from .parts.thinking import ThinkingAnswer, split_thinking, split_thinking_ids, with_thinking_mode
from .parts.tokenization_coordinates import PaddedCoordinateTokenizer
from .registration import register_all

__version__ = "0.1.0"

__all__ = [
    "CoordinateLogitsProcessor",
    "CoordinateTokenIds",
    "GroupedTopKRouter",
    "LocationTokens",
    "LossNormalizer",
    "MoGEConfig",
    "MoGEForCausalLM",
    "MoGEModel",
    "NaViTConfig",
    "NaViTDualEncoder",
    "NaViTDualEncoderConfig",
    "NaViTForImageClassification",
    "NaViTImageProcessor",
    "NaViTModel",
    "PaddedCoordinateTokenizer",
    "PanguEmbeddedConfig",
    "PanguEmbeddedForCausalLM",
    "PanguEmbeddedModel",
    "RouterStatistics",
    "ThinkingAnswer",
    "VisionLanguageConfig",
    "VisionLanguageForConditionalGeneration",
    "VisionLanguageModel",
    "VisionLanguageProcessor",
    "WindowFreeViTConfig",
    "WindowFreeViTImageProcessor",
    "WindowFreeViTModel",
    "balance_loss",
    "compose",
    "compose_processor",
    "linear_weighted_cross_entropy",
    "multi_label_cluster_loss",
    "router_z_loss",
    "sample_negative_centers",
    "set_experts_implementation",
    "split_thinking",
    "split_thinking_ids",
    "weighted_cross_entropy",
    "with_thinking_mode",
]

register_all()
load_backends()
