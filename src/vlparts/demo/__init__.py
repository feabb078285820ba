"""Demo: train a small vision-language model from random weights to locate digits in photographs."""
