"""CLIP: pre-training, classification and retrieval."""
