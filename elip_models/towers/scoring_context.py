"""Work that chooses tokens, apart from the pass that trains."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def scoring_context(model: nn.Module, tensor: Tensor) -> Iterator[None]:
    """Inside, on the device of `tensor`, nothing has a gradient, and what the pass around it draws
    and casts stays as if nothing had run: dropout draws the same, replayed or not.
    """
    with torch.no_grad(), _isolated_rng(model, tensor), _uncached_autocast(tensor.device.type):
        yield


@contextmanager
def _isolated_rng(model: nn.Module, tensor: Tensor) -> Iterator[None]:
    if not model.training or torch.compiler.is_compiling():
        yield
        return
    with torch.random.fork_rng([tensor.device] if tensor.is_cuda else []):
        yield


def _uncached_autocast(device: str) -> torch.autocast | nullcontext:
    """The autocast of the caller, without its cache.

    Some releases of torch would hand a weight that was cast here, without gradient, to the training
    pass that follows.
    """
    if torch.compiler.is_compiling() or device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
