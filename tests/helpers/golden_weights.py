"""Weights that a golden run was given by a rule, instead of by a file."""

import math
import random

import torch


def ruled(name, shape):
    """A tensor, fp64, that follows from its name in the official model: three digits, norms about
    1, others within .35."""
    rng = random.Random(name)  # which Python promises to be the same everywhere
    values = [round(rng.uniform(-1, 1), 3) for _ in range(math.prod(shape))]
    values = torch.tensor(values, dtype=torch.float64).view(shape)
    is_scale = "norm" in name.lower() and name.endswith("weight")
    return 1 + 0.3 * values if is_scale else 0.35 * values


def matrix(rows, columns, seed):
    """(rows, columns) in (-1, 1), fp64, three digits."""
    return ruled(f"input {seed}", (rows, columns)) / 0.35
