"""Parameters, memory, FLOPs and time of a training run at any scale, from the model on the meta device."""
