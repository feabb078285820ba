"""Logits processors for generation."""

from ..parts.vlm_generation import WindowedNGramLogitsProcessor
from .constrained_coordinates import CoordinateLogitsProcessor

__all__ = ["CoordinateLogitsProcessor", "WindowedNGramLogitsProcessor"]
