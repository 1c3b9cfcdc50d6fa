"""What AdamW gets: parameter groups and the learning rate of a step."""

import math
from typing import Any

from torch import nn

MAX_WARMUP_SHARE = 0.2


def learning_rate(step: int, *, lr: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based): linear warm-up to `lr`, then cosine to 0.

    Warm-up takes at most a fifth of the run, so that a shortened recipe still trains.
    """
    warmup_steps = min(warmup_steps, int(MAX_WARMUP_SHARE * total_steps))
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; biases, norms, single vectors and the temperature do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.squeeze().ndim >= 2]
    others = [parameter for parameter in trained if parameter.squeeze().ndim < 2]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
