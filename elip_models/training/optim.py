"""What AdamW gets: parameter groups and the learning rate of a step."""

import math
from collections.abc import Mapping
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
    decay: Literal["cosine", "linear", "step"] = "cosine",
    min_lr: float = 0.0,
    decay_rate: float = 0.9,
    steps_per_epoch: float = math.inf,
) -> float:
    """Learning rate of optimiser step `step` (0-based): linear warm-up to `lr`, then decay.

    Warm-up takes at most a fifth of the run, so that a shortened recipe still trains.

    Args:
        decay: 'cosine' or 'linear' from the end of the warm-up to `min_lr` at the end of the run;
            'step' multiplies by `decay_rate` each epoch, counted from step 0, down to `min_lr`.
    """
    warmup_steps = min(warmup_steps, int(MAX_WARMUP_SHARE * total_steps))
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if decay == "step":
        epoch = int(step / steps_per_epoch + 1e-6)  # which is not exact where batches accumulate
        return max(min_lr, lr * decay_rate**epoch)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    left = 1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + (lr - min_lr) * left


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scale: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, single vectors and the temperature do not.

    Args:
        lr_scale: pattern of parameter names, `*` for any part -> multiple of the learning rate;
            the first that fits counts.

    Returns:
        Groups for an optimiser, each with its `lr_scale`: those that decay first; empty ones are
        left out, but for the first two.

    Raises:
        ValueError: a pattern that fits no parameter.
    """
    scales = lr_scale or {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    fitted = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        pattern = next((p for p in scales if fnmatchcase(name, p)), None)
        fitted.add(pattern)
        key = scales.get(pattern, 1.0), parameter.squeeze().ndim >= 2
        groups.setdefault(key, []).append(parameter)
    if unfitted := scales.keys() - fitted:
        raise ValueError(
            f"lr_scale: expected patterns that fit a parameter, got {sorted(unfitted)}"
        )
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for (scale, decays), parameters in groups.items()
    ]
