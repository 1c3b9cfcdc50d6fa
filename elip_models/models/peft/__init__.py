"""Parameter-efficient fine-tuning of our models: adapters, and adapters on disk."""
