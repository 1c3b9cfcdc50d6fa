"""Run ops in the dtypes of their inputs, with autocast on or off."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """Return a context without autocast on the device of `tensor`; cheap if autocast is off."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap `function` so that it runs without autocast on the device of its first argument."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with no_autocast(args[0]):
            return function(*args, **kwargs)

    return run
