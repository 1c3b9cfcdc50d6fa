"""Ops compute in the dtypes that they say, whatever autocast is on around them."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` without autocast on the device of its first argument, a tensor."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):  # entering the context takes 10 us
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
