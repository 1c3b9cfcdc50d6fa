"""Parameter groups, and the learning rate of a step."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

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

    `OptimConfig` documents the settings. Only parameters that require a gradient are grouped. The
    first two groups have an `lr_scale` of 1, with and without decay, and may be empty.
    """
    scales = lr_scale or {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    fitted = set()
    for name, parameter in model.named_parameters():
        pattern = next((p for p in scales if fnmatchcase(name, p)), None)
        fitted.add(pattern)
        if not parameter.requires_grad:
            continue
        if no_decay is None:
            decays = sum(size != 1 for size in parameter.shape) > 1
        else:
            decays = not any(fnmatchcase(name, each) for each in no_decay)
        key = scales.get(pattern, 1.0), decays
        groups.setdefault(key, []).append(parameter)
    if unfitted := scales.keys() - fitted:
        raise ValueError(
            f"lr_scale: expected patterns that match a parameter, got {sorted(unfitted)}"
        )
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for (scale, decays), parameters in groups.items()
    ]
