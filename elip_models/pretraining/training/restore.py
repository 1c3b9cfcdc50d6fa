"""Restoring model, optimiser and random generators from a checkpoint, and a check of the result.

`accelerate` converts weights of another dtype, takes any options of the optimiser, and ignores
random states that it cannot set. So what was restored is compared with what the run must have.
"""

import pickle
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.optim import Optimizer

from elip_models.pretraining.models.base import PretrainedModel
from elip_models.validation import TrainingError, require_extra

with require_extra("elip_models.pretraining.training"):
    from safetensors import SafetensorError, safe_open

UNREADABLE = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError),
    *(pickle.UnpicklingError, SafetensorError, CheckpointException),
)
"""Errors of reading files whose content is not what was saved."""
UNUSED_SEED = 0x0DDBA11
"""A seed that no run has, to see whether random states were set."""
UNCOMPARED = ("params", "lr", "fused", "foreach")
"""Options of an optimiser that change from step to step, or with the device."""


class Parallel(Protocol):
    """What is restored: `ReplicatedModel` or `ShardedModel`."""

    model: PretrainedModel
    optimizer: Optimizer

    def load(self, folder: Path) -> None:
        """Load a checkpoint."""


def restore_(parallel: Parallel, checkpoint: Path) -> None:
    """Load a checkpoint; raise TrainingError if it does not have what a run saves."""
    groups = [dict(group) for group in parallel.optimizer.param_groups]
    before = torch.manual_seed(UNUSED_SEED).get_state()
    try:
        parallel.load(checkpoint)
        problem = (
            _weights_problem(parallel.model, checkpoint / "model.safetensors")
            or _groups_problem(groups, parallel.optimizer.param_groups)
            or _state_problem(parallel.optimizer)
        )
    except UNREADABLE as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise _refusal(checkpoint, problem) from error
    if torch.equal(before, torch.get_rng_state()):
        problem = "random states that cannot be set"
    if problem is not None:
        raise _refusal(checkpoint, problem)


def _refusal(checkpoint: Path, problem: str) -> TrainingError:
    return TrainingError(
        f"{checkpoint} cannot be resumed: expected what the run saved, got {problem}; remove it to "
        "resume an older one"
    )


def _weights_problem(model: PretrainedModel, path: Path) -> str | None:
    """Describe a weight of another dtype or with NaN; sharded models have no such file."""
    if not path.exists():
        return None
    state = model.state_dict()
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            weight = file.get_tensor(name)
            if weight.dtype != state[name].dtype:
                return f"{name} of {weight.dtype}"
            if weight.is_floating_point() and weight.isnan().any():
                return f"NaN in {name}"
    return None


def _groups_problem(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> str | None:
    for own, restored in zip(expected, found, strict=True):
        for name, value in own.items():
            if name not in UNCOMPARED and restored.get(name) != value:
                return f"{name} = {restored.get(name)!r:.100} of the optimiser"
    return None


def _state_problem(optimizer: Optimizer) -> str | None:
    """Describe a state that does not fit its parameter, or the states of the same group."""
    for group in optimizer.param_groups:
        states = [
            (each, optimizer.state[each]) for each in group["params"] if each in optimizer.state
        ]
        for parameter, state in states:
            if _kinds(state) != _kinds(states[0][1]):
                return "states of unequal names or kinds in the optimiser"
            for name, value in state.items():
                if not _fits(value, torch.Size() if name == "step" else parameter.shape):
                    return f"{name} of another kind or size, or with NaN, in the optimiser"
    return None


def _kinds(state: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in state.items()}


def _fits(value: Any, shape: torch.Size) -> bool:
    """Return whether a value of the optimiser is a number, or a tensor of numbers of a shape."""
    if not isinstance(value, Tensor):
        return isinstance(value, int | float)
    return value.shape == shape and value.is_floating_point() and not bool(value.isnan().any())
