"""Formats: how each family of models writes regions as text."""
