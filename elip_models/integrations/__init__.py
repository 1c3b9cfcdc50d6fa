"""Reduction in the tools of others: Trainer, open_clip training, PEFT adapters."""
