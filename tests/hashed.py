"""Numbers that a name gives, the same on every machine: weights that need not be recorded."""

import math
import zlib

import torch

STEPS = ((2654435761, 16), (2246822519, 13), (3266489917, 16))


def hashed(name, *shape):
    """fp64 in [-1/2, 1/2), a hash of the name and of each number's place."""
    numbers = torch.arange(math.prod(shape)) + zlib.crc32(name.encode())
    for factor, shift in STEPS:
        numbers = numbers * factor % 2**32
        numbers = numbers ^ (numbers >> shift)
    return (numbers.double() / 2**32 - 0.5).view(shape)


@torch.no_grad()
def fill_hashed_(model, official_name, *, without=()):
    """Each parameter by the name that the official code gives it: matrices twice as large, weights
    of norms around 1."""
    for name, weight in model.named_parameters():
        official = official_name(name)
        if official not in without:
            values = hashed(official, *weight.shape) * (2 if weight.dim() > 1 else 1)
            weight.copy_(values + ("orm" in official and official.endswith("weight")))
