"""Plugins for serving engines. Each engine is imported by the files with its name alone."""
