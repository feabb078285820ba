"""The parts themselves: a flat folder, so that a checkpoint can carry any of it as remote code."""
