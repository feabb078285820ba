"""The public names of vlparts, which `vlparts/__init__.py` loads on first use."""

from .composition import compose, compose_processor
from .generation import CoordinateLogitsProcessor
from .losses import (
    LossNormalizer,
    linear_weighted_cross_entropy,
    multi_label_cluster_loss,
    sample_negative_centers,
    weighted_cross_entropy,
)
from .moe import RouterStatistics, set_experts_implementation
from .parts.configuration_deepencoder import DeepEncoderConfig
from .parts.configuration_fused_vision import FusedVisionConfig
from .parts.configuration_moge import MoGEConfig
from .parts.configuration_navit import NaViTConfig
from .parts.configuration_navit_dual_encoder import NaViTDualEncoderConfig
from .parts.configuration_pangu_embedded import PanguEmbeddedConfig
from .parts.configuration_vlm import VisionLanguageConfig
from .parts.configuration_windowfree import WindowFreeViTConfig
from .parts.coordinate_tokens import CoordinateTokenIds, LocationTokens
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
from .parts.moe_losses import balance_loss, router_z_loss
from .parts.moe_router import GroupedTopKRouter
from .parts.processing_vlm import VisionLanguageProcessor
from .parts.thinking import ThinkingAnswer, split_thinking, split_thinking_ids, with_thinking_mode
from .parts.token_reduction import VisionTokenReducer
from .parts.tokenization_coordinates import PaddedCoordinateTokenizer
from .token_reduction import reduce_tokens
