"""Reusable vision-language parts for Hugging Face transformers.

The parts are registered with transformers' Auto classes as soon as both packages are imported. Public names are loaded
on first use, so that `import vlparts.coordinates` needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._import_hook import import_frameworks, register_with_transformers

if TYPE_CHECKING:
    from ._public import *

__version__ = "0.1.0"

__all__ = [
    "CattyImageProcessor",
    "CoordinateLogitsProcessor",
    "CoordinateTokenIds",
    "DeepEncoderConfig",
    "DeepEncoderImageProcessor",
    "DeepEncoderModel",
    "FusedVisionConfig",
    "FusedVisionModel",
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
    "VisionTokenReducer",
    "WindowFreeViTConfig",
    "WindowFreeViTImageProcessor",
    "WindowFreeViTModel",
    "balance_loss",
    "compose",
    "compose_processor",
    "linear_weighted_cross_entropy",
    "multi_label_cluster_loss",
    "reduce_tokens",
    "router_z_loss",
    "sample_negative_centers",
    "set_experts_implementation",
    "split_thinking",
    "split_thinking_ids",
    "weighted_cross_entropy",
    "with_thinking_mode",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import_frameworks()
        return getattr(importlib.import_module("vlparts._public"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
