"""The models of downstream tasks: a pre-trained model, and the head that a task puts on it."""
