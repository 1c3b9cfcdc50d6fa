"""Values that any public op refuses for an argument, by the annotation of the argument."""

import inspect

import torch
from torch import Tensor

from elip_kernels._example import EXAMPLES, Sizes

SMALL = Sizes(B=2, N=10, D=8, K=6, H=2, dtype=torch.float32)
BY_ANNOTATION = {
    Tensor: [None, [1.0], torch.tensor(1.0), torch.ones(2, 3, 4, 5, 6)],
    Tensor | None: ["yes", [1.0], torch.tensor(1.0), torch.ones(2, 3, 4, 5, 6)],
    bool: [1, None, "yes"],
    int: [None, True, "4", 1.5, -1],
    float: [None, True, "small"],
    int | float: [None, True, "4", 0, -1],
    float | None: [True, "small"],
    str: [None, 1, "no such name"],
}


def good_arguments(name):
    """Return arguments of the example of an op, which it takes."""
    return EXAMPLES[name].arguments(SMALL)


def refused_values(name):
    """Return a list of refused values for every argument of an op."""
    parameters = inspect.signature(EXAMPLES[name].function).parameters.values()
    return {p.name: BY_ANNOTATION.get(p.annotation, [None, "yes"]) for p in parameters}
