"""Time and memory of settings relative to the dense model, as they are deployed.

Settings of a batch size are timed side by side with the dense model, in interleaved rounds, after a
warm-up. Compiled models are timed a few at once beside the dense one, because torch.compile runs a
function that it has compiled for many models uncompiled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from elip_models.calibration.task import Task
from elip_models.profiling.measure import Step, peak_bytes, ratios_to, time_side_by_side

ROUNDS = 5
COMPILED = 3
"""Settings that are compiled at once."""
DENSE = "dense"


class Cost(NamedTuple):
    """The cost of a setting.

    Attributes:
        time: its share of the dense time, by batch size and, if there are several, by step:
            {"1": 0.8, "8": 0.7}.
        memory: its share of the dense peak of GPU memory at the last batch size; None on a CPU.
    """

    time: dict[str, float]
    memory: float | None

    @property
    def deciding(self) -> float:
        """Return the time of the first step at the largest batch."""
        largest = max(int(key.split()[0]) for key in self.time)
        return next(time for key, time in self.time.items() if key.split()[0] == str(largest))


def measured_costs(
    task: Task,
    dense: nn.Module,
    models: dict[str, nn.Module],
    images: Sequence[int],
    *,
    batch_sizes: Sequence[int],
    compile: bool = False,
) -> dict[str, Cost]:
    """Return the cost of each model.

    Args:
        task: what runs the models.
        dense: the model without reduction.
        models: the models, by name.
        images: numbers of images, at least as many as the largest batch.
        batch_sizes: images in a batch.
        compile: run the models by torch.compile.
    """
    device = next(dense.parameters()).device
    names = list(models)
    size = COMPILED if compile else max(1, len(names))
    groups = [
        {name: models[name] for name in names[first : first + size]}
        for first in range(0, len(names), size)
    ]
    times: dict[str, dict[str, float]] = {name: {} for name in models}
    memory: dict[str, float | None] = dict.fromkeys(models)
    for group in groups:
        for batch_size in batch_sizes:
            batch = images[:batch_size]
            all_steps = {
                name: task.steps(model, batch) for name, model in {DENSE: dense, **group}.items()
            }
            for label in all_steps[DENSE]:
                steps = {name: steps[label] for name, steps in all_steps.items()}
                if compile:
                    torch.compiler.reset()
                    steps = {name: _compiled(step) for name, step in steps.items()}
                ratios = ratios_to(DENSE, time_side_by_side(steps, device=device, rounds=ROUNDS))
                key = f"{batch_size} {label}".strip()
                for name in group:
                    times[name][key] = ratios[name]
                if device.type == "cuda":
                    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
                    memory |= {name: peaks[name] / peaks[DENSE] for name in group}
    return {name: Cost(times[name], memory[name]) for name in models}


def _compiled(step: Step) -> Step:
    return torch.compile(lambda: step(), dynamic=False)
