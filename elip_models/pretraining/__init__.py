"""The paper's models: data, training, tasks, checkpoints and recipes."""
