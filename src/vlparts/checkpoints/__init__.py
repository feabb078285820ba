"""Published checkpoints of other models as parts: one file for each family, with its names and what it refuses."""
