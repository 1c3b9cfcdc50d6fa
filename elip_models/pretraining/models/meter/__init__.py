"""METER: pre-training and its downstream tasks."""
