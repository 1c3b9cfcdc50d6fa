"""A model that each process holds in full: one process, or DistributedDataParallel."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.training.optim import make_optimizer, step_
from elip_models.pretraining.training.run_config import OptimConfig
from elip_models.validation import as_config_error

if TYPE_CHECKING:
    from accelerate import Accelerator


class ReplicatedModel:
    """The model and its optimiser."""

    def __init__(
        self, accelerator: "Accelerator", model: PretrainedModel, optim: OptimConfig
    ) -> None:
        self.accelerator = accelerator
        with as_config_error("optim"):
            optimizer = make_optimizer(model, optim)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.model: PretrainedModel = accelerator.unwrap_model(self.wrapped)
        backend = "inductor" if optim.compile is True else optim.compile
        self.compiled = torch.compile(self.wrapped, backend=backend) if backend else self.wrapped

    def forward(self, **tensors: Tensor) -> Any:
        """Return the model's output in the precision of the run."""
        return self.compiled(**tensors)

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context for a batch, in which gradients are all-reduced at the end of a step."""
        return self.accelerator.accumulate(self.wrapped)

    def step_(self, max_norm: float | None) -> Tensor:
        """Clip the gradients and take a step, unless they are not finite.

        Return the gradient norm over all processes, before clipping. None does not clip.
        """
        max_norm = math.inf if max_norm is None else max_norm
        grad_norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), max_norm)
        if self.accelerator.scaler is None:
            step_(self.optimizer, grad_norm)
        else:
            self.optimizer.step()  # the scaler skips it if the gradient is not finite
        self.optimizer.zero_grad()
        self.model.clamp_temperature_()
        return grad_norm

    @contextmanager
    def evaluation_model(self) -> Iterator[PretrainedModel]:
        """Yield the model to evaluate and save."""
        yield self.model

    def finish(self) -> PretrainedModel:
        """Return the trained model in eval mode, without wrappers."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)  # ends autocast too
        return self.model.eval()

    def save(self, folder: Path) -> None:
        """Write model, optimiser and random generators."""
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        """Load what `save` wrote."""
        self.accelerator.load_state(str(folder))
