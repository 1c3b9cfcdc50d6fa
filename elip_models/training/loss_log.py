"""Losses of training steps, read back from the device a few steps at a time."""

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elip_models.training.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


def losses_of(output: Any) -> dict[str, Tensor]:
    """The losses of a model's output, a dataclass: `loss` and each `loss_..`, detached scalars."""
    names = [field.name for field in fields(output)]
    return {
        name: getattr(output, name).detach()
        for name in names
        if name == "loss" or name.startswith("loss_")
    }


class LossLog:
    """Steps whose losses and gradient norms are still on the device.

    Args:
        most: so many steps in a row that are not finite end the run.
    """

    def __init__(self, accelerator: "Accelerator", *, most: int) -> None:
        self.accelerator, self.most = accelerator, most
        self.names: tuple[str, ...] = ()
        self.losses: list[Tensor] = []  # (one a name,) of each step
        self.norms: list[Tensor] = []
        self.skipped, self.in_a_row = 0, 0
        self.last: dict[str, float] = {}  # of the last finite step

    def __len__(self) -> int:
        return len(self.losses)

    def add(self, batches: list[dict[str, Tensor]], grad_norm: Tensor) -> None:
        """A step: the losses of its batches, and the norm of its gradient."""
        self.names = tuple(batches[0])
        stacked = [torch.stack([losses[name] for name in self.names]) for losses in batches]
        self.losses.append(torch.stack(stacked).mean(0))
        self.norms.append(grad_norm)

    def read(self, step: int) -> dict[str, float]:
        """Reads the pending steps back, one synchronisation for all of them.

        Args:
            step: how many are done.

        Returns:
            The losses of the last finite one, means over ranks, and its `grad_norm`; `nonfinite`,
            how many were not and were skipped, once there was one.

        Raises:
            TrainingError: `most` steps in a row had a loss, or without a gradient scaler a gradient
                norm, that is not finite.
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
            self.in_a_row = 0 if is_finite else self.in_a_row + 1
            self.skipped += not is_finite
            if is_finite:
                self.last = named | {"grad_norm": norm}
            if self.in_a_row >= self.most:
                raise _diverged(number, self.most, named, norm)
        self.losses.clear()
        self.norms.clear()
        nonfinite = {"nonfinite": self.skipped} if self.skipped else {}
        return {name: math.nan for name in self.names} | self.last | nonfinite


def _diverged(step: int, most: int, losses: dict[str, float], norm: float) -> TrainingError:
    named = ", ".join(f"{name.replace('_', ' ')} {loss:.4g}" for name, loss in losses.items())
    return TrainingError(
        f"step {step}, the last of {most} in a row: {named}, gradient norm {norm:.4g}: not finite; "
        "lower optim.lr, lengthen optim.warmup_steps, or set optim.max_grad_norm or "
        "optim.precision; --resume goes on from the last checkpoint"
    )
