"""`accelerate` as a recipe asks for it.

Buffers are not broadcast: the queue of features, their largest, is the same on every rank.
"""

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from elip_models.training.run_config import RunConfig
from elip_models.training.run_folder import RunFolder
from elip_models.validation import ConfigError, as_config_error, require_extra

with require_extra("elip_models.training"):
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

MOST_WAITED = timedelta(days=7)
STORE_OF_ITS_OWN = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def make_accelerator(config: RunConfig, folder: RunFolder) -> Accelerator:
    """Precision, accumulation and trackers of `config`, files of trackers in `folder`.

    Raises:
        ConfigError: a precision or a tracker that there is not, or restarts that could hang.
    """
    _check_restarts()
    optim = config.optim
    told = logging.getLogger("accelerate.utils.other")
    told.addFilter(lambda record: "Removed shared tensor" not in record.getMessage())  # tied: meant
    with as_config_error("optim.precision or trackers"):
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # or torchrun on CPUs is not seen
            mixed_precision="no" if optim.precision == "fp32" else optim.precision,
            gradient_accumulation_steps=optim.grad_accumulation,
            log_with=list(config.trackers) or None,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            project_config=ProjectConfiguration(str(folder.path), str(folder.tensorboard)),
        )
    if missing := set(config.trackers) - {str(tracker) for tracker in accelerator.log_with}:
        raise ConfigError(f"trackers: expected installed ones, got {sorted(missing)}")
    return accelerator


def waiting_group(accelerator: "Accelerator") -> "dist.ProcessGroup | None":
    """All processes of a run, to wait in for what the main one does alone, an evaluation of hours:
    at a barrier of the training's own group NCCL ends the run after ten minutes. None of one.
    """
    if accelerator.num_processes == 1:
        return None
    return dist.new_group(backend="gloo", timeout=MOST_WAITED)


def _check_restarts() -> None:
    """Where torchrun lends its own store, restarted processes find the addresses of those that have
    ended in it, and may wait for them for ever (torch 2.13).
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    is_lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and is_lent and os.environ.get(STORE_OF_ITS_OWN) != "1":
        raise ConfigError(
            f"torchrun: expected {STORE_OF_ITS_OWN}=1 in the environment beside "
            f"--max-restarts={restarts}, or restarted processes may wait for those that have ended"
        )
