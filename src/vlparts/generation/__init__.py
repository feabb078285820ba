"""Logits processors for generation."""

from ..parts.vlm_ngram_ban import WindowedNGramLogitsProcessor
from .constrained_coordinates import CoordinateLogitsProcessor

__all__ = ["CoordinateLogitsProcessor", "WindowedNGramLogitsProcessor"]
