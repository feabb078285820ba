"""Losses weighted per sample and per token: cross-entropy, distillation, preferences, and cluster discrimination."""

from .causal_lm import WEIGHTED_LOSS_NAME, weighted_causal_lm_loss
from .cluster_discrimination import multi_label_cluster_loss, sample_negative_centers
from .cross_entropy import WeightedLoss, weighted_cross_entropy, weighted_cross_entropy_with_parts
from .distillation import weighted_distillation_loss
from .dpo import SequenceLogProbs, sequence_log_probs, weighted_dpo_loss
from .linear_cross_entropy import linear_weighted_cross_entropy, linear_weighted_cross_entropy_with_parts
from .normalizer import LossNormalizer
from .sample_weights import (
    importance_by_length,
    importance_by_record,
    importance_by_task,
    root_length_importance,
    root_subsegments_importance,
)
from .token_weights import (
    ANSWER,
    THINKING,
    Constant,
    Cosine,
    Exponential,
    Linear,
    Segments,
    position_weights,
    thinking_segments,
)
from .weights import (
    PRESETS,
    Denominators,
    TokenWeights,
    next_token_labels,
    weigh_next_tokens,
    weigh_tokens,
)

__all__ = [
    "ANSWER",
    "PRESETS",
    "THINKING",
    "WEIGHTED_LOSS_NAME",
    "Constant",
    "Cosine",
    "Denominators",
    "Exponential",
    "Linear",
    "LossNormalizer",
    "Segments",
    "SequenceLogProbs",
    "TokenWeights",
    "WeightedLoss",
    "importance_by_length",
    "importance_by_record",
    "importance_by_task",
    "linear_weighted_cross_entropy",
    "linear_weighted_cross_entropy_with_parts",
    "multi_label_cluster_loss",
    "next_token_labels",
    "position_weights",
    "root_length_importance",
    "root_subsegments_importance",
    "sample_negative_centers",
    "sequence_log_probs",
    "thinking_segments",
    "weigh_next_tokens",
    "weigh_tokens",
    "weighted_causal_lm_loss",
    "weighted_cross_entropy",
    "weighted_cross_entropy_with_parts",
    "weighted_distillation_loss",
    "weighted_dpo_loss",
]
