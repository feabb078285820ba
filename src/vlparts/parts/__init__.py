"""The parts themselves: a flat folder, so that a checkpoint can carry any of it as remote code."""

import transformers  # noqa: F401 (first, since its import registers the parts: see `vlparts._import_hook`)
