"""Metrics of predicted regions."""
