"""A device that compiles kernels and runs none, to measure and test the host's part of a call."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks.kernel_analysis.compile import SHARED_MEMORY, Arch, target_of
from elip_kernels._triton import triton
from elip_kernels.testing import launchers_on_cpu

Launches = list[tuple[Any, ...]]


class StubDriver:
    """A driver of Triton that answers like a device of an architecture.

    Attributes:
        device: number of the current device.
        launches: (grid, stream, function, arguments) of each launch; None: launches are not kept.
    """

    def __init__(self, arch: Arch, launches: Launches | None) -> None:
        self.arch, self.launches, self.device = arch, launches, 0
        self.kernels: set[Any] = set()
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (None, name, 32, 0, 1024),  # no module to unload
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY[arch]},
        )

    def get_current_target(self) -> Any:
        """Return the architecture."""
        return target_of(self.arch)

    def get_current_device(self) -> int:
        """Return the number of the device."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """Return a stream that differs by device."""
        return 100 + device

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return a function that takes a launch and keeps it."""
        self.kernels.add(source.fn)

        def launch(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            for hook in (enter, leave):
                if hook is not None:
                    hook(metadata)
            if self.launches is not None:
                self.launches.append(((x, y, z), stream, function, arguments))

        return launch


@contextmanager
def stub_device(arch: Arch = 90, *, keep: bool = True) -> Iterator[StubDriver]:
    """Launch the kernels of ops on CPU tensors with a `StubDriver`; outputs stay unwritten.

    Args:
        arch: the architecture that the kernels are compiled for.
        keep: whether to keep the launches, which takes time and memory.
    """
    driver = StubDriver(arch, [] if keep else None)
    with ExitStack() as stack:
        stack.enter_context(patch.object(triton.runtime.driver, "_active", driver))
        stack.enter_context(patch("elip_kernels._validate.is_readable", lambda tensor: False))
        stack.enter_context(launchers_on_cpu())
        yield driver
    for each in driver.kernels:  # which would be launched on the stub again
        each.device_caches.clear()
