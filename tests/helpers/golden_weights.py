"""Recorded runs of fine-tuning: their tensors, and weights and inputs that follow from a name."""

import math
import random
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden"
BOUND = 2e-6  # of the largest entry: the official runs are fp64, our losses are fp32 inside


def recorded(name):
    """Return the tensors of a run, in fp64 and int64."""
    case = load_file(GOLDEN / f"{name}.safetensors")
    return {n: t.double() if t.is_floating_point() else t.long() for n, t in case.items()}


def padded(counts, *answers):
    """Return flat lists of the answers to all questions as (B, A, ..), zero for a missing one."""
    real = torch.arange(int(counts.max())) < counts[:, None]
    rows = [values.new_zeros(*real.shape, *values.shape[1:]) for values in answers]
    for row, values in zip(rows, answers, strict=True):
        row[real] = values
    return rows


def assert_close(got, expected, name="", least=1e-12):
    """Compare relative to the largest entry, or to `least` if that is larger."""
    bound = BOUND * expected.abs().max().clamp_min(least)
    assert (got.double().reshape(expected.shape) - expected).abs().max() <= bound, name


def assert_gradients(got, expected, least):
    """Compare all gradients; `least`, relative to the largest one, is for those of rounding."""
    assert got.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert_close(got[name], grad, name, least * largest)


def ruled(name, shape):
    """Return the float64 parameter of a recorded run, given its name in the official model.

    Values have three digits. Weights of norms are within 0.3 of 1, others within 0.35 of 0.
    """
    values = _drawn(name, math.prod(shape)).view(shape)
    is_scale = "norm" in name.lower() and name.endswith("weight")
    return 1 + 0.3 * values if is_scale else 0.35 * values


@cache
def _drawn(name, count):
    rng = random.Random(name)  # Python guarantees the same numbers on every machine
    values = [round(rng.uniform(-1, 1), 3) for _ in range(count)]
    return torch.tensor(values, dtype=torch.float64)


def matrix(rows, columns, seed):
    """Return a (rows, columns) float64 input in (-1, 1) with three digits."""
    return ruled(f"input {seed}", (rows, columns)) / 0.35
