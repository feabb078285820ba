"""Losses weighted per sample and per token, and related losses."""
