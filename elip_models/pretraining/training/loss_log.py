"""Losses of training steps, read back from the device a few steps at a time."""

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elip_models.validation import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


def losses_of(output: Any) -> dict[str, Tensor]:
    """Return the detached scalars `loss` and `loss_..` of a model's output, a dataclass."""
    names = [field.name for field in fields(output)]
    return {
        name: getattr(output, name).detach()
        for name in names
        if name == "loss" or name.startswith("loss_")
    }


class LossLog:
    """Losses and gradient norms of steps that have not been read back from the device yet."""

    def __init__(self, accelerator: "Accelerator", *, max_nonfinite: int) -> None:
        self.accelerator, self.max_nonfinite = accelerator, max_nonfinite
        self.names: tuple[str, ...] = ()
        self.pending: list[Tensor] = []  # of each step: its losses, then the norm of its gradient
        self.skipped, self.in_a_row = 0, 0
        self.last: dict[str, float] = {}  # losses and norm of the last finite step

    def __len__(self) -> int:
        return len(self.pending)

    def add(self, batches: list[dict[str, Tensor]], grad_norm: Tensor) -> None:
        """Store the losses of a step's batches and the norm of its gradient."""
        self.names = tuple(batches[0])
        means = torch.stack([torch.stack(tuple(losses.values())) for losses in batches]).mean(0)
        self.pending.append(torch.cat([means, grad_norm.reshape(1)]).float())

    def read(self, step: int) -> dict[str, float]:
        """Read the pending steps back, with one synchronisation, when `step` steps are done.

        Return the losses of the last finite step, averaged over ranks, its `grad_norm`, and
        `nonfinite`, the number of skipped steps, if there are any. `max_nonfinite` steps in a row
        raise TrainingError. With a gradient scaler only the losses have to be finite.
        """
        values = self.accelerator.reduce(torch.stack(self.pending), "mean")  # norms are equal
        checked = values if self.accelerator.scaler is None else values[:, :-1]
        rows = zip(checked.isfinite().all(1).tolist(), values.tolist(), strict=True)
        for number, (is_finite, row) in enumerate(rows, step - len(self) + 1):
            losses = dict(zip((*self.names, "grad_norm"), row, strict=True))
            if is_finite:
                self.in_a_row, self.last = 0, losses
                continue
            self.in_a_row += 1
            self.skipped += 1
            if self.in_a_row >= self.max_nonfinite:
                shown = ", ".join(f"{name.replace('_', ' ')} {v:.4g}" for name, v in losses.items())
                raise TrainingError(
                    f"step {number}, the last of {self.in_a_row} in a row: {shown}: not finite; "
                    "lower optim.lr, lengthen optim.warmup_steps, or set optim.max_grad_norm or "
                    "optim.precision; --resume continues from the last checkpoint"
                )
        self.pending.clear()
        nonfinite = {"nonfinite": self.skipped} if self.skipped else {}
        return dict.fromkeys(self.names, math.nan) | self.last | nonfinite
