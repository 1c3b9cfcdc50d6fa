"""The optimiser of a recipe: AdamW of torch, or Lion or Muon of timm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elip_models.pretraining.training.optim import parameter_groups
from elip_models.pretraining.training.run_config import OptimConfig
from elip_models.validation import require_extra

with require_extra("elip_models.pretraining.training"):
    from timm.optim import Lion, Muon

MIN_MATRIX_SIDE = 4
"""Smallest side of a matrix that Muon updates; ITM's head has only two rows."""


def make_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """Return the optimiser that `optim` names; each of its groups has an `lr_scale`.

    Muon updates the weights of linear layers. The rest, such as embeddings and vectors, is updated
    by AdamW inside the same optimiser.
    """
    groups = parameter_groups(model, optim.weight_decay, optim.lr_scale, no_decay=optim.no_decay)
    if optim.name == "lion":
        return Lion(groups, lr=optim.lr, betas=optim.betas)
    if optim.name == "muon":
        groups = _split_groups(groups, _hidden_matrices(model), optim.eps)
        return Muon(groups, lr=optim.lr, betas=optim.betas, nesterov=True)
    fused = torch.cuda.is_available() or None  # skips a step without a synchronisation: `step_`
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)


def step_(optimizer: Optimizer, grad_norm: Tensor) -> None:
    """Take a step of the optimiser, unless the gradient's norm is not finite.

    A fused optimiser on a GPU skips the step there, without a synchronisation. For all others the
    host waits for the norm.
    """
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    if is_fused and grad_norm.device.type != "cpu":
        skip_nonfinite_step_(optimizer, grad_norm)
        optimizer.step()
    elif grad_norm.isfinite():
        optimizer.step()


def skip_nonfinite_step_(optimizer: Optimizer, grad_norm: Tensor) -> None:
    """Set a fused optimiser to skip its next step if the norm is not finite."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimiser
    inner.grad_scale, inner.found_inf = None, (~grad_norm.isfinite()).float()


def _hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of linear layers, except those shared with an embedding."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return {weight for weight in weights - embeddings if min(weight.shape) >= MIN_MATRIX_SIDE}


def _split_groups(
    groups: list[dict[str, Any]], hidden: set[nn.Parameter], eps: float
) -> list[dict[str, Any]]:
    """Split each group for Muon and AdamW, which is timm's `use_fallback` without Nesterov."""
    split = []
    for group in groups:
        for is_hidden, options in (
            (True, {"use_fallback": False}),
            (False, {"use_fallback": True, "nesterov": False, "eps": eps}),
        ):
            chosen = [each for each in group["params"] if (each in hidden) == is_hidden]
            split.append(group | options | {"params": chosen})
    return split
