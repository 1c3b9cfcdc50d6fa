"""The processes of one run, one for each GPU of a machine, which torchrun starts.

torchrun --nproc-per-node=4 -m elip_models.cli embed SOURCE --model MODEL --output FOLDER
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

LONGEST = timedelta(weeks=52)
"""Time that a process waits for the others, whose shards may take as long as the whole run."""


@dataclass(frozen=True)
class Processes:
    """The number of this process and of all processes; shards are dealt out in turn."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process locks the folder, and writes all files but the shards."""
        return self.rank == 0

    def own(self, shards: int) -> range:
        """Return the numbers of the shards that this process encodes."""
        return range(self.rank, shards, self.count)

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def device(self, device: str | None) -> str | None:
        """Return the GPU of this process, unless a device is given or there is one process."""
        if device is not None or self.count == 1 or not torch.cuda.is_available():
            return device
        return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"


def rank_in_environment() -> int:
    """Return the rank that torchrun set; 0 without it."""
    return int(os.environ.get("RANK", 0))


def processes_in_environment() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Yield the processes that torchrun has started, connected with each other."""
    count = processes_in_environment()
    if count == 1 or dist.is_initialized():
        yield Processes() if count == 1 else Processes(dist.get_rank(), dist.get_world_size())
        return
    dist.init_process_group("gloo", timeout=LONGEST)
    yield Processes(rank_in_environment(), count)
    dist.destroy_process_group()  # not after an error, when the others do not come
