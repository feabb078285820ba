"""Logits processors: what a model may generate."""
