"""What AdamW gets: parameter groups and the learning rate of a step."""

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
    """Learning rate of optimiser step `step` (0-based): linear warm-up to `lr`, then decay.

    Warm-up takes at most a fifth of the run, so that a shortened recipe still trains.

    Args:
        warmup_lr: of step 0, from which it rises by equal steps to reach `lr` at `warmup_steps`;
            None rises from 0, which it leaves at step 0.
        decay: 'cosine' or 'linear' from the end of the warm-up to `min_lr` at the end of the run;
            'step' multiplies by `decay_rate` each epoch, counted from step 0, down to `min_lr`.
        decay_each: 'epoch' holds cosine and linear through each epoch, counted from step 0.
    """
    warmup_steps = min(warmup_steps, int(MAX_WARMUP_SHARE * total_steps))
    if step < warmup_steps:
        if warmup_lr is None:
            return lr * (step + 1) / warmup_steps
        return warmup_lr + (lr - warmup_lr) * step / warmup_steps
    epoch = int(step / steps_per_epoch + 1e-6)  # which is not exact where batches accumulate
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
    """Matrices decay; biases, norms, single vectors and the temperature do not.

    Args:
        no_decay: patterns of parameter names that do not, instead; none in an empty list.
        lr_scale: pattern of parameter names, `*` for any part -> multiple of the learning rate;
            the first that fits counts.

    Returns:
        Groups for an optimiser, each with its `lr_scale`: those that decay first; empty ones are
        left out, but for the first two.

    Raises:
        ValueError: a pattern of `lr_scale` that fits no parameter.
    """
    scales = lr_scale or {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    fitted = set()
    for name, parameter in model.named_parameters():
        pattern = next((p for p in scales if fnmatchcase(name, p)), None)
        fitted.add(pattern)
        if not parameter.requires_grad:
            continue
        exempt = _any_fits(name, no_decay) if no_decay is not None else _is_vector(parameter)
        key = scales.get(pattern, 1.0), not exempt
        groups.setdefault(key, []).append(parameter)
    if unfitted := scales.keys() - fitted:
        raise ValueError(
            f"lr_scale: expected patterns that fit a parameter, got {sorted(unfitted)}"
        )
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for (scale, decays), parameters in groups.items()
    ]


def _any_fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_vector(parameter: nn.Parameter) -> bool:
    return sum(size != 1 for size in parameter.shape) < 2
