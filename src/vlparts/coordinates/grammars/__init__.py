"""Grammars: how the text of a format is written and parsed."""
