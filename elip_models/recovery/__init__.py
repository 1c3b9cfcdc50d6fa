"""Recover what a reduction changes: distillation without labels."""
