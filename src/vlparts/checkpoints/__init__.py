"""Published checkpoints of other models as parts: one folder per family."""
