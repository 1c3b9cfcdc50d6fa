"""Replacements on a CPU for what only a GPU has; each takes the calls of the real object.

Streams, events and memory do nothing. A graph repeats the ops that PyTorch dispatched during its
capture, in the same memory.
"""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import create_autospec, patch

import torch
from torch._inductor import cudagraph_trees
from torch.cuda import CUDAGraph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elip_kernels import launch

ANSWERS = {
    "current_device": 0,
    "device_count": 2,
    "empty_cache": None,
    "get_device_properties": SimpleNamespace(L2_cache_size=0),
    "max_memory_allocated": 0,
    "mem_get_info": (2**40, 2**40),
    "memory_allocated": 0,
    "reset_peak_memory_stats": None,
    "set_sync_debug_mode": None,
    "synchronize": None,
    "_sleep": None,
}
"""Functions of `torch.cuda` and what they return here."""


class Recording(TorchDispatchMode):
    """Record every call of an op. As in a capture, reading a value on the host is an error."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _graph(keep_graph=False):
    graph = create_autospec(CUDAGraph, instance=True)
    graph.recording = Recording()
    graph.replay.side_effect = graph.recording.replay
    return graph


def _manager():
    """Return a manager of the compiler's graphs that recorded one graph."""
    manager = create_autospec(cudagraph_trees.CUDAGraphTreeManager, instance=True)
    manager.get_roots.return_value = iter([object()])
    return manager


@contextmanager
def fake_cuda():
    """Make `torch.cuda` work without a GPU inside the block."""
    with ExitStack() as stack:

        def replace(module, name, **behaviour):
            return stack.enter_context(patch.object(module, name, autospec=True, **behaviour))

        stream = create_autospec(torch.cuda.Stream, instance=True)
        replace(torch.cuda, "current_stream", return_value=stream)
        for name, answer in ANSWERS.items():
            replace(torch.cuda, name, return_value=answer)
        replace(torch.cuda, "Event").return_value.elapsed_time.return_value = 1.0
        replace(torch.cuda, "Stream")
        replace(torch.cuda, "stream")
        replace(torch.cuda, "CUDAGraph", side_effect=_graph)
        replace(torch.cuda, "graph", side_effect=lambda cuda_graph, **_: cuda_graph.recording)
        replace(cudagraph_trees, "get_manager", side_effect=lambda *_, **__: _manager())
        yield


@contextmanager
def guarded_launches():
    """Raise inside the block if a kernel is not launched under `launch.device_guard`."""
    guards, run = [], launch.run

    @contextmanager
    def device_guard(tensor):
        guards.append(tensor.device)
        try:
            yield
        finally:
            guards.pop()

    def guarded(kernel, *args, **kwargs):
        assert guards, f"{kernel.fn.__name__} is launched on the current device, not its tensors'"
        run(kernel, *args, **kwargs)

    with (
        patch.object(launch, "device_guard", autospec=True, side_effect=device_guard),
        patch.object(launch, "run", guarded),
    ):
        yield
