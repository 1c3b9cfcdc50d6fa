"""A model whose weights, gradients and optimiser state are sharded over the processes by FSDP2.

    unit        each transformer layer by itself, then the rest, by `fully_shard`
    scalars     such as the temperature: replicated, their gradients are averaged here
    precision   autocast as under DistributedDataParallel, but without its weight cache: a cast
                weight that two passes share would get its gradient too late for FSDP
    checkpoint  each process writes its shards, by torch.distributed.checkpoint

accelerate handles ranks, device, accumulation, trackers and random generators. To evaluate and to
save, the main process gathers the weights into a copy of the model in host memory.
"""

import copy
import math
import warnings
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
from torch.optim import Optimizer

from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.momentum_model import DistilledModel
from elip_models.pretraining.models.registry import family_of
from elip_models.pretraining.training.optimizers import make_optimizer, step_
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
SHARDS_FOLDER = "shards"
"""Name of the folder inside a checkpoint."""


def check_sharding(config: RunConfig, num_processes: int) -> None:
    """Raise ConfigError for a recipe whose model or options sharding does not support."""
    optim = config.optim
    with as_config_error("model.name"):
        family = family_of(config.model.name, config.task)
    if num_processes == 1:
        raise ConfigError(
            "optim.shard: expected false on one process, which has nothing to share, got true; "
            "start several with torchrun --nproc-per-node"
        )
    if issubclass(family, DistilledModel):
        raise ConfigError(
            f"optim.shard: expected false for {family.__name__}, whose momentum encoders need "
            "gathered weights, which FSDP frees, got true; CLIP and METER can be sharded"
        )
    unsupported = {
        "precision": ("'fp32' or 'bf16'", "the gradient scaler would check only one shard"),
        "name": ("'adamw' or 'lion'", "Muon makes whole matrices orthogonal, not shards"),
        "ema": ("null", "the average needs a whole model"),
        "compile": ("false", "compiled shards are not tested"),
    }
    given = optim.precision == "fp16", optim.name == "muon", optim.ema is not None, optim.compile
    for is_given, (name, (expected, reason)) in zip(given, unsupported.items(), strict=True):
        if is_given:
            raise ConfigError(
                f"optim.{name}: expected {expected} with optim.shard=true, as {reason}, got "
                f"{getattr(optim, name)!r}"
            )


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
        self.scalars = shard_(model, accelerator.device)
        with as_config_error("optim"):
            self.optimizer = make_optimizer(model, optim)
        _separate_groups_(self.optimizer)

    def forward(self, **tensors: Tensor) -> Any:
        """Return the model's output in the precision of the run."""
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            return self.model(**tensors)

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context for a batch; gradients are reduced after every backward pass."""
        return self.accelerator.accumulate()

    def step_(self, max_norm: float | None) -> Tensor:
        """Clip the gradients and take a step, as `ReplicatedModel.step_` does."""
        for each in self.scalars:
            if each.grad is not None:
                each.grad = self.accelerator.reduce(each.grad, "mean")
        grad_norm = clip_grad_norm_(self.model, math.inf if max_norm is None else max_norm)
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
        dcp.save(self._state(), checkpoint_id=folder / SHARDS_FOLDER)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote."""
        state = self._state()
        dcp.load(state, checkpoint_id=folder / SHARDS_FOLDER)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.accelerator.load_state(str(folder))

    @contextmanager
    def expected_warnings_ignored(self) -> Iterator[None]:
        """Ignore FSDP2's warning about outputs that are views: no output is changed in place."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            yield

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def shard_(model: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """Shard each transformer layer, then the model; return the scalars, which stay whole."""
    for module in model.modules():
        if isinstance(module, LAYERS):
            fully_shard(module)
    scalars = [each for each in model.parameters() if each.ndim == 0]
    fully_shard(model, ignored_params=set(scalars))
    for each in scalars:
        each.data = each.data.to(device)
    return scalars


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Clip gradients, some of which are shards, and return their norm before clipping."""
    given = [each for each in model.parameters() if each.grad is not None]
    groups = [
        [each for each in given if isinstance(each, DTensor) == is_shard]
        for is_shard in (True, False)
    ]
    groups = [group for group in groups if group]
    norms = [get_total_norm([each.grad for each in group]) for group in groups]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    grad_norm = torch.linalg.vector_norm(torch.stack(whole))
    for group in groups:
        clip_grads_with_norm_(group, max_norm, grad_norm)
    return grad_norm


def _separate_groups_(optimizer: Optimizer) -> None:
    """Split groups into shards and whole parameters, which fused optimisers cannot mix."""
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        for is_shard in (True, False):
            chosen = [each for each in group["params"] if isinstance(each, DTensor) == is_shard]
            if chosen:
                optimizer.add_param_group(group | {"params": chosen})
