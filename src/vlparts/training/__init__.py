"""Fine-tuning of composed models with transformers' Trainer."""
