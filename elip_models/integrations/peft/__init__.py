"""Parameter-efficient fine-tuning of our models, and adapters on disk."""
