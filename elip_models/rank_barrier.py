"""A barrier of distributed processes that ends with the error of a process that failed.

    barrier = RankBarrier()         # all processes together
    with barrier.reporting():       # an error in here ends the wait of the others
        ...
        barrier.wait()

A barrier of PyTorch waits for a process that failed and still runs until its timeout. Here the
process that fails writes its error to a store, which the others read while they wait.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from elip_models.validation import ConfigError, DataError, TrainingError

LONGEST = timedelta(weeks=52)
"""Time that a process waits for the others, of which one may evaluate or encode for days."""
PAUSE, GRACE = 0.05, 5.0  # seconds between two looks; for the others to read the error
FAILED, ENDED = "failed", "ended"
ERRORS = {kind.__name__: kind for kind in (ConfigError, DataError, TrainingError, OSError)}


class RankBarrier:
    """The barrier of all processes of the default group; it does nothing for one process."""

    def __init__(self) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        self.num_processes = dist.get_world_size() if is_distributed else 1
        self.rank = dist.get_rank() if is_distributed else 0
        if self.num_processes == 1:
            return
        self.group = dist.new_group(backend="gloo", timeout=LONGEST)
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        address = [host, 0]
        if self.rank == 0:
            self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            address = [host, self.store.port]
        dist.broadcast_object_list(address, group=self.group)
        if self.rank != 0:
            self.store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have called this; raise the error of one that failed."""
        if self.num_processes == 1:
            return
        work = dist.barrier(self.group, async_op=True)
        try:
            while not work.is_completed():
                self._raise_error_of_others()
                time.sleep(PAUSE)
            work.wait()
        except (dist.DistError, RuntimeError) as error:
            self._raise_error_of_others()
            raise TrainingError(f"another process ended without an error: {error}") from error

    def _raise_error_of_others(self) -> None:
        if self.store.check([FAILED]):
            rank, kind, text = json.loads(self.store.get(FAILED))
            if rank != self.rank:
                error = ERRORS.get(kind, RuntimeError)
                raise error(f"{text} ({kind} of process {rank} of {self.num_processes})")

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Write an error inside the block to the store, where the other processes read it."""
        try:
            yield
        except BaseException as error:
            if self.num_processes > 1:
                with suppress(dist.DistError):  # process 0, which has the store, has ended
                    self._report(error)
            raise

    def _report(self, error: BaseException) -> None:
        """Write an error, unless there is one; process 0, whose store ends with it, then waits."""
        content = json.dumps([self.rank, type(error).__name__, str(error)])
        self.store.compare_set(FAILED, "", content)
        ended, start = self.store.add(ENDED, 1), time.monotonic()
        while self.rank == 0 and ended < self.num_processes and time.monotonic() - start < GRACE:
            time.sleep(PAUSE)
            ended = self.store.add(ENDED, 0)
