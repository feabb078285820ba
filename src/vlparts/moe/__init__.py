"""Mixture of experts: experts implementations for any transformers model, and router statistics."""

import transformers  # noqa: F401 (first, since its import registers the parts: see `vlparts._import_hook`)
