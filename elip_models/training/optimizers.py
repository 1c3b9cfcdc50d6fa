"""The optimiser of a recipe: AdamW of torch, Lion or Muon of timm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elip_models.training.optim import parameter_groups
from elip_models.training.run_config import OptimConfig
from elip_models.validation import require_extra

with require_extra("elip_models.training"):
    from timm.optim import Lion, Muon

LEAST_SIDE = 4
"""Of a matrix that Muon makes orthogonal; ITM's head, of two rows, is no such."""


def make_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimiser that `optim` names, over groups that each have an `lr_scale`.

    Muon takes the weights of linear layers, AdamW, inside the same optimiser, the rest: embeddings,
    the patch embedding, vectors.

    Raises:
        ValueError: a pattern of `optim.lr_scale` that fits no parameter.
    """
    groups = parameter_groups(model, optim.weight_decay, optim.lr_scale, no_decay=optim.no_decay)
    if optim.name == "lion":
        return Lion(groups, lr=optim.lr, betas=optim.betas)
    if optim.name == "muon":
        groups = _split(groups, _hidden_matrices(model), optim.eps)
        return Muon(groups, lr=optim.lr, betas=optim.betas, nesterov=True)
    fused = torch.cuda.is_available() or None  # which skips a step without the host: `step_`
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)


def step_(optimizer: Optimizer, grad_norm: Tensor) -> None:
    """A step of the optimiser, or none where the gradient's norm is not finite.

    AdamW, fused on a GPU, is told so there and leaves parameters and state alone; for another the
    host waits for the norm.
    """
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    if is_fused and grad_norm.device.type != "cpu":
        tell_(optimizer, grad_norm)
        optimizer.step()
    elif grad_norm.isfinite():
        optimizer.step()


def tell_(optimizer: Optimizer, grad_norm: Tensor) -> None:
    """Let a fused optimiser skip its next step where the norm is not finite, as a gradient scaler
    would.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    inner.grad_scale, inner.found_inf = None, (~grad_norm.isfinite()).float()


def _hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Weights of linear layers, but for those that are an embedding's too."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return {weight for weight in weights - embeddings if min(weight.shape) >= LEAST_SIDE}


def _split(
    groups: list[dict[str, Any]], hidden: set[nn.Parameter], eps: float
) -> list[dict[str, Any]]:
    """Each group as that of Muon and that of AdamW, which is timm's `use_fallback` without
    Nesterov.
    """
    split = []
    for group in groups:
        for is_hidden, options in (
            (True, {"use_fallback": False}),
            (False, {"use_fallback": True, "nesterov": False, "eps": eps}),
        ):
            chosen = [each for each in group["params"] if (each in hidden) == is_hidden]
            split.append(group | options | {"params": chosen})
    return split
