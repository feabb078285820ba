"""Fast kernels for the operations of `vlparts.parts`, one package per device."""

import transformers  # noqa: F401 (first, since its import registers the parts: see `vlparts._import_hook`)
