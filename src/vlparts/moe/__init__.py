"""Mixture of experts: experts implementations for any transformers model, and router statistics."""
