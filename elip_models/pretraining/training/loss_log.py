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
        self.losses: list[Tensor] = []  # of each step, (len(names),)
        self.norms: list[Tensor] = []
        self.skipped, self.in_a_row = 0, 0
        self.last: dict[str, float] = {}  # losses of the last finite step

    def __len__(self) -> int:
        return len(self.losses)

    def add(self, batches: list[dict[str, Tensor]], grad_norm: Tensor) -> None:
        """Store the losses of a step's batches and the norm of its gradient."""
        self.names = tuple(batches[0])
        stacked = [torch.stack([losses[name] for name in self.names]) for losses in batches]
        self.losses.append(torch.stack(stacked).mean(0))
        self.norms.append(grad_norm)

    def read(self, step: int) -> dict[str, float]:
        """Read the pending steps back, with one synchronisation, when `step` steps are done.

        Return the losses of the last finite step, averaged over ranks, its `grad_norm`, and
        `nonfinite`, the number of skipped steps, if there are any. `max_nonfinite` steps in a row
        raise TrainingError. With a gradient scaler only the losses have to be finite.
        """
        losses, norms = torch.stack(self.losses).float(), torch.stack(self.norms).float()
        losses = self.accelerator.reduce(losses, "mean")
        finite = losses.isfinite().all(1)
        if self.accelerator.scaler is None:
            finite &= norms.isfinite()
        first = step - len(self) + 1
        rows = zip(finite.tolist(), losses.tolist(), norms.tolist(), strict=True)
        for number, (is_finite, values, norm) in enumerate(rows, first):
            named = dict(zip(self.names, values, strict=True))
            if is_finite:
                self.in_a_row = 0
                self.last = named | {"grad_norm": norm}
            else:
                self.in_a_row += 1
                self.skipped += 1
            if self.in_a_row >= self.max_nonfinite:
                shown = ", ".join(f"{n.replace('_', ' ')} {loss:.4g}" for n, loss in named.items())
                raise TrainingError(
                    f"step {number}, the last of {self.in_a_row} in a row: {shown}, gradient norm "
                    f"{norm:.4g}: not finite; lower optim.lr, lengthen optim.warmup_steps, or set "
                    "optim.max_grad_norm or optim.precision; --resume continues from the last "
                    "checkpoint"
                )
        self.losses.clear()
        self.norms.clear()
        nonfinite = {"nonfinite": self.skipped} if self.skipped else {}
        return {name: math.nan for name in self.names} | self.last | nonfinite
