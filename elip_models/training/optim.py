"""Parameter groups, and the learning rate of a step."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

MAX_WARMUP_SHARE = 0.2


def learning_rate(
    step: int,
    *,
    lr: float,
    warmup_steps: int,
    total_steps: int,
    warmup_lr: float | None = None,
    decay: Literal["cosine", "linear", "step"] = "cosine",
    decay_each: Literal["step", "epoch"] = "step",
    min_lr: float = 0.0,
    decay_rate: float = 0.9,
    steps_per_epoch: float = math.inf,
) -> float:
    """Return the learning rate of a step: linear warm-up to `lr`, then decay.

    Warm-up takes at most a fifth of the run, so that a shortened recipe still trains.

    Args:
        step: Optimiser step, counted from 0.
        lr: Peak learning rate.
        warmup_steps: Length of the warm-up.
        total_steps: Length of the run.
        warmup_lr: Learning rate of step 0, which rises by equal steps to `lr` at step
            `warmup_steps`. None: step i has (i + 1) / warmup_steps of `lr`.
        decay: 'cosine' or 'linear' to `min_lr` at the end of the run; 'step' multiplies by
            `decay_rate` each epoch, counted from step 0, down to `min_lr`.
        decay_each: With 'epoch', cosine and linear decay are constant within an epoch, counted from
            step 0.
        min_lr: Lowest learning rate of the decay.
        decay_rate: Factor of the decay 'step'.
        steps_per_epoch: Optimiser steps in an epoch, which may be a fraction.
    """
    warmup_steps = min(warmup_steps, int(MAX_WARMUP_SHARE * total_steps))
    if step < warmup_steps:
        if warmup_lr is None:
            return lr * (step + 1) / warmup_steps
        return warmup_lr + (lr - warmup_lr) * step / warmup_steps
    epoch = int(step / steps_per_epoch + 1e-6)  # steps_per_epoch may be a rounded fraction
    if decay == "step":
        return max(min_lr, lr * decay_rate**epoch)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if decay_each == "epoch":
        progress = epoch * steps_per_epoch / total_steps
    left = 1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + (lr - min_lr) * left


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    lr_scale: Mapping[str, float] | None = None,
    *,
    no_decay: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Group the parameters by weight decay and by multiple of the learning rate.

    By default, biases, norms, single vectors and the temperature have no weight decay.

    Args:
        model: The model, of which parameters that require a gradient are grouped.
        weight_decay: That of all other parameters.
        lr_scale: Multiples of the learning rate by pattern of parameter names, with `*` for any
            part. The first pattern that matches counts.
        no_decay: Patterns of parameters without weight decay, instead of the default ones.

    Returns:
        Groups for an optimiser, each with its `lr_scale`. The first two have scale 1, with and
        without decay, and may be empty.

    Raises:
        ValueError: A pattern of `lr_scale` that matches no parameter.
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
            decays = not _is_vector(parameter)
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


def _is_vector(parameter: nn.Parameter) -> bool:
    return sum(size != 1 for size in parameter.shape) < 2
