"""A model that is whole on every process: one alone, or several under DistributedDataParallel."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from elip_models.models.base import PretrainedModel
from elip_models.training.optimizers import make_optimizer, step_
from elip_models.training.run_config import OptimConfig
from elip_models.validation import as_config_error

if TYPE_CHECKING:
    from accelerate import Accelerator


class Replicated:
    """The model, its optimiser, and the moving average of its weights, where the recipe asks for
    one.

    `model` is the model without what training wraps around it.
    """

    def __init__(
        self, accelerator: "Accelerator", model: PretrainedModel, optim: OptimConfig
    ) -> None:
        self.accelerator = accelerator
        with as_config_error("optim"):
            optimizer = make_optimizer(model, optim)
        self.average = None if optim.ema is None else self._average_of(model, optim.ema)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.model: PretrainedModel = accelerator.unwrap_model(self.wrapped)
        backend = "inductor" if optim.compile is True else optim.compile
        self.compiled = torch.compile(self.wrapped, backend=backend) if backend else self.wrapped

    def _average_of(self, model: PretrainedModel, decay: float) -> AveragedModel:
        """The moving average of the weights, as part of the checkpoints."""
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        average.module.to(self.accelerator.device)  # the count of steps stays with the host
        self.accelerator.register_for_checkpointing(average)
        return average

    def forward(self, **tensors: Tensor) -> Any:
        """The model's output, in the precision of the run."""
        return self.compiled(**tensors)

    def accumulate(self) -> AbstractContextManager[None]:
        """Around forward and backward of a batch: gradients are reduced after the last of a
        step.
        """
        return self.accelerator.accumulate(self.wrapped)

    def step_(self, max_norm: float | None) -> Tensor:
        """Clips the gradients and takes a step, unless they are not finite.

        Returns:
            Their norm, of all processes, before clipping.
        """
        most = math.inf if max_norm is None else max_norm
        grad_norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), most)
        if self.accelerator.scaler is None:
            step_(self.optimizer, grad_norm)
        else:
            self.optimizer.step()  # the scaler leaves it out where the gradient is not finite
        self.optimizer.zero_grad()
        self.model.clamp_temperature_()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return grad_norm

    @contextmanager
    def evaluated(self) -> Iterator[PretrainedModel]:
        """What is evaluated and saved: the average, where there is one."""
        yield self.model if self.average is None else self.average.module

    def finish(self) -> PretrainedModel:
        """What training leaves, without wrappers, in eval mode."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)  # autocast too
        with self.evaluated() as model:
            return model.eval()

    def save(self, folder: Path) -> None:
        """Writes model, optimiser, average and random generators."""
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        self.accelerator.load_state(str(folder))
