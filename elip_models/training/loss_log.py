"""Losses of training steps, read back from the device a few steps at a time."""

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
    """Steps whose losses and gradient norms are still on the device."""

    def __init__(self, accelerator: "Accelerator") -> None:
        self.accelerator = accelerator
        self.names: tuple[str, ...] = ()
        self.losses: list[Tensor] = []  # (one a name,) of each step
        self.norms: list[Tensor] = []

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
            The losses of the last one, means over ranks, and its `grad_norm`.

        Raises:
            TrainingError: a loss, or without a gradient scaler a gradient norm, is not finite.
        """
        losses, norms = torch.stack(self.losses).float(), torch.stack(self.norms).float()
        losses = self.accelerator.reduce(losses, "mean")
        finite = losses.isfinite().all(1)
        if self.accelerator.scaler is None:
            finite &= norms.isfinite()
        if not finite.all():
            first = int((~finite).nonzero()[0])
            found = zip(self.names, losses[first].tolist(), strict=True)
            named = ", ".join(f"{name.replace('_', ' ')} {loss:.4g}" for name, loss in found)
            raise TrainingError(
                f"step {step - len(self) + first + 1}: {named}, gradient norm "
                f"{norms[first]:.4g}: not finite; lower optim.lr, lengthen optim.warmup_steps, or "
                "set optim.max_grad_norm or optim.precision"
            )
        last = dict(zip(self.names, losses[-1].tolist(), strict=True))
        grad_norm = norms[-1].item()
        self.losses.clear()
        self.norms.clear()
        return last | {"grad_norm": grad_norm}
