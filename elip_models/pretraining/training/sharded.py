"""A model whose weights, gradients and optimiser state are sharded over the processes by FSDP2.

    unit        each transformer layer by itself, then the rest, by `fully_shard`
    scalars     such as the temperature: replicated, their gradients are averaged here
    precision   autocast as under DistributedDataParallel, but without its weight cache: a cast
                weight that two passes share would get its gradient too late for FSDP
    checkpoint  each process writes its shards, by torch.distributed.checkpoint

accelerate's FSDP2 plugin takes no scalar parameters and no CPUs: PyTorch shards the model.
accelerate handles ranks, device, accumulation, trackers and random generators.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.momentum_model import DistilledModel
from elip_models.pretraining.models.registry import family_of
from elip_models.pretraining.training.optim import make_optimizer, step_
from elip_models.pretraining.training.run_config import OptimConfig, RunConfig
from elip_models.validation import ConfigError, as_config_error, require_extra

with require_extra("elip_models.pretraining.training"):
    from accelerate.utils import AutocastKwargs
    from timm.models.vision_transformer import Block
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

if TYPE_CHECKING:
    from accelerate import Accelerator

LAYERS = (Block, BertLayer, CLIPEncoderLayer)


def check_sharding(config: RunConfig, num_processes: int) -> None:
    """Raise ConfigError for a recipe whose model or options sharding does not support."""
    optim = config.optim
    with as_config_error("model.name"):
        family = family_of(config.model.name, config.task)
    is_distilled = issubclass(family, DistilledModel)
    problems = {
        "one process has nothing to share: start several by torchrun": num_processes == 1,
        f"the momentum encoders of {family.__name__} need gathered weights": is_distilled,
        "optim.precision=fp16: the gradient scaler would check one shard": optim.precision
        == "fp16",
        "optim.compile: compiled shards are not tested": bool(optim.compile),
    }
    for problem, is_present in problems.items():
        if is_present:
            raise ConfigError(f"optim.shard: expected false, got true, but {problem}")


class ShardedModel:
    """A sharded model and its optimiser, with the interface of `ReplicatedModel`.

    `model` is sharded, except for its scalars. All processes call every method together.
    """

    def __init__(
        self, accelerator: "Accelerator", model: PretrainedModel, optim: OptimConfig
    ) -> None:
        self.accelerator = accelerator
        self.copy = copy.deepcopy(model) if accelerator.is_main_process else None
        self.model = model
        self.scalars = _shard_(model, accelerator.device)
        with as_config_error("optim"):
            self.optimizer = make_optimizer(model, optim)

    def forward(self, **tensors: Tensor) -> Any:
        """Return the model's output in the precision of the run."""
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            return self.model(**tensors)

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context for a batch; gradients are reduced after every backward pass."""
        return self.accelerator.accumulate()

    def step_(self, max_norm: float | None) -> Tensor:
        """Clip the gradients and take a step, as `ReplicatedModel.step_` does."""
        for scalar in self.scalars:
            if scalar.grad is not None:
                scalar.grad = self.accelerator.reduce(scalar.grad, "mean")
        grad_norm = _clip_grad_norm_(self.model, math.inf if max_norm is None else max_norm)
        step_(self.optimizer, grad_norm)
        self.optimizer.zero_grad()
        self.model.clamp_temperature_()
        return grad_norm

    @contextmanager
    def evaluation_model(self) -> Iterator[PretrainedModel | None]:
        """Yield the whole model on the main process, on its device; None on the others."""
        yield self._gathered()
        if self.copy is not None:
            self.copy.to("cpu")

    def finish(self) -> PretrainedModel:
        """Return the whole model on the main process, the sharded one on others, in eval mode."""
        return (self._gathered() or self.model).eval()

    def _gathered(self) -> PretrainedModel | None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        if self.copy is None:
            return None
        self.copy.load_state_dict(state)
        return self.copy.to(self.accelerator.device)

    def save(self, folder: Path) -> None:
        """Write the shards of model and optimiser, and the random generators of each process."""
        self.accelerator.save_state(str(folder))
        dcp.save(self._state(), checkpoint_id=folder / "shards")

    def load(self, folder: Path) -> None:
        """Load what `save` wrote."""
        state = self._state()
        dcp.load(state, checkpoint_id=folder / "shards")
        states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **states)
        self.accelerator.load_state(str(folder))

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def _shard_(model: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """Shard each transformer layer, then the model; return the scalars, which stay whole."""
    for module in model.modules():
        if isinstance(module, LAYERS):
            fully_shard(module)
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    fully_shard(model, ignored_params=set(scalars))
    for scalar in scalars:
        scalar.data = scalar.data.to(device)
    return scalars


def _clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Clip gradients, some of which are shards, and return their norm before clipping."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    shards = [parameter for parameter in trained if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in trained if not isinstance(parameter, DTensor)]
    groups = [parameters for parameters in (shards, whole) if parameters]  # one op mixes no two
    norms = [get_total_norm([p.grad for p in parameters]) for parameters in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    grad_norm = torch.linalg.vector_norm(torch.stack(norms))
    for parameters in groups:
        clip_grads_with_norm_(parameters, max_norm, grad_norm)
    return grad_norm
