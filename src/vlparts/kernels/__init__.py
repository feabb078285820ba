"""Fast kernels for the operations of `vlparts.parts`, one package per device."""
