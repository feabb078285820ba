"""Logits processors for generation."""

from .constrained_coordinates import CoordinateLogitsProcessor

__all__ = ["CoordinateLogitsProcessor"]
