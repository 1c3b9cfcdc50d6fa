"""The `accelerate.Accelerator` of a run, and its expected warnings."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from elip_kernels._switch import ProcessSwitch
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.validation import ConfigError, as_config_error, require_extra

with require_extra("elip_models.pretraining.training"):
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

LOGGER = logging.getLogger("accelerate.utils.other")
NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def make_accelerator(config: RunConfig, folder: RunFolder) -> Accelerator:
    """Return an Accelerator with the precision, accumulation and trackers of `config`.

    Raises ConfigError for an unknown precision or tracker, or restarts by torchrun that could hang.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and is_shared and os.environ.get(NO_SHARED_STORE) != "1":  # torch 2.13
        raise ConfigError(
            f"torchrun: expected {NO_SHARED_STORE}=1 in the environment with "
            f"--max-restarts={restarts}, or restarted processes may wait forever"
        )
    optim = config.optim
    with as_config_error("optim.precision or trackers"):
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else torchrun on CPUs is not detected
            mixed_precision="no" if optim.precision == "fp32" else optim.precision,
            gradient_accumulation_steps=optim.grad_accumulation,
            log_with=list(config.trackers) or None,
            # the largest buffer, the queue of features, is already equal on every rank
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            project_config=ProjectConfiguration(str(folder.path), str(folder.tensorboard)),
        )
    if missing := set(config.trackers) - {str(tracker) for tracker in accelerator.log_with}:
        raise ConfigError(f"trackers: expected installed ones, got {sorted(missing)}")
    return accelerator


def _raise_level() -> int:
    before = LOGGER.level
    LOGGER.setLevel(logging.ERROR)
    return before


_QUIET = ProcessSwitch(_raise_level, LOGGER.setLevel)


@contextmanager
def expected_warnings_ignored() -> Iterator[None]:
    """Ignore warnings about what a run intends: tied weights, and outputs of FSDP2 as views."""
    # one for the run: one in each step would repeat warnings
    with _QUIET.on(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        yield
