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
    return torch.autocast(device, enabled=False) if _is_enabled(device) else nullcontext()


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap `function` so that it runs without autocast on the device of its first argument."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device.type
        if not _is_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def _is_enabled(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)
