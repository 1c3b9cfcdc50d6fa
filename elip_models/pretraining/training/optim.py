"""Learning rate of a step, parameter groups, and steps of AdamW."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elip_models.pretraining.training.run_config import OptimConfig

MAX_WARMUP_SHARE = 0.2


def learning_rate(
    step: int, optim: OptimConfig, *, total_steps: int, steps_per_epoch: float = math.inf
) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up to `lr`, then decay.

    Warm-up takes at most a fifth of the run, so that a shortened recipe still trains.
    `steps_per_epoch` may be a fraction.
    """
    warmup_steps = min(optim.warmup_steps, int(MAX_WARMUP_SHARE * total_steps))
    if step < warmup_steps:
        if optim.warmup_lr is None:
            return optim.lr * (step + 1) / warmup_steps
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup_steps
    epoch = int(step / steps_per_epoch + 1e-6)  # steps_per_epoch may be a rounded fraction
    if optim.decay == "step":
        return max(optim.min_lr, optim.lr * optim.decay_rate**epoch)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if optim.decay_each == "epoch":
        progress = epoch * steps_per_epoch / total_steps
    is_linear = optim.decay == "linear"
    left = 1.0 - progress if is_linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * left


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    lr_scale: Mapping[str, float] | None = None,
    *,
    no_decay: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Group the parameters by weight decay and by multiple of the learning rate.

    `OptimConfig` documents the settings. Only parameters that require a gradient are grouped.
    Scalars, which FSDP2 does not shard, have groups of their own.
    """
    scales = lr_scale or {}
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    used = set()
    for name, parameter in model.named_parameters():
        scaled = next((pattern for pattern in scales if fnmatchcase(name, pattern)), None)
        used.add(scaled)
        if not parameter.requires_grad:
            continue
        if no_decay is None:
            decays = sum(size != 1 for size in parameter.shape) > 1
        else:
            decays = not any(fnmatchcase(name, pattern) for pattern in no_decay)
        key = scales.get(scaled, 1.0), decays, parameter.ndim == 0
        groups.setdefault(key, []).append(parameter)
    if unused := scales.keys() - used:
        raise ValueError(
            f"lr_scale: expected patterns that match a parameter, got {sorted(unused)}"
        )
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for (scale, decays, _), parameters in groups.items()
    ]


def make_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """Return AdamW with the settings of `optim`; each of its groups has an `lr_scale`."""
    groups = parameter_groups(model, optim.weight_decay, optim.lr_scale, no_decay=optim.no_decay)
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
