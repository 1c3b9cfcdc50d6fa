"""Which forward a recomputed block belongs to (activation checkpointing).

Checkpointing runs a block again during backward. Guidance may be gone by then, and scoring again
would cost a second dry run, so the block does what its own forward did. Two ways to find it:

    non-re-entrant  the checkpoint's frame is the same object in forward and recomputation, and
                    lives as long as the graph: what ran in it is remembered with it
    re-entrant      the forward runs without gradient and leaves no trace in the graph. Autograd
                    numbers its nodes in the order of the forward, and made the checkpoint's own
                    node before: what ran in it is the first behind. A bounded number is kept.
"""

import inspect
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from elip_models.reduction.step import Forward

MAX_REENTRANT = 64  # forwards of a block that may still wait for their backward

Pack = Callable[..., Any]


@dataclass
class Region:
    """What ran in one checkpoint: the forwards of each block in their order, as a recomputation
    comes to them again; `recomputation` tells one from another.
    """

    forwards: dict[int, list["Forward"]] = field(default_factory=dict)
    recomputation: object = None
    done: dict[int, int] = field(default_factory=dict)

    def add(self, i: int, forward: "Forward") -> None:
        self.forwards.setdefault(i, []).append(forward)

    def next(self, i: int, recomputation: object) -> "Forward":
        """The forward of block i that the recomputation has come to."""
        if self.recomputation != recomputation:
            self.recomputation, self.done = recomputation, {}
        self.done[i] = self.done.get(i, 0) + 1
        return self.forwards[i][self.done[i] - 1]


class Numbered(NamedTuple):
    """What ran without gradient: its number in autograd's count of that thread."""

    number: int
    thread: int
    region: Region


class Replay:
    """The forwards that a checkpoint may run again."""

    def __init__(self) -> None:
        self.regions: WeakKeyDictionary[Any, Region] = WeakKeyDictionary()
        self.reentrant: dict[int, deque[Numbered]] = {}
        self.forgotten: dict[int, int] = {}  # the latest number of each block that had to go

    def __reduce__(self) -> tuple[type, tuple]:
        """A copy has run nothing."""
        return Replay, ()

    def remember(self, i: int, forward: "Forward") -> None:
        """`forward` enters block i, in the checkpoints that are open, if any."""
        for pack in _open_checkpoints():
            if _is_forward(pack):
                frame = _variable(pack, "frame")
                self.regions.setdefault(frame, Region()).add(i, forward)
        if _is_reentrant_forward():
            here = (_next_number(), threading.get_ident())
            passes = self.reentrant.setdefault(i, deque())
            if not passes or passes[-1][:2] != here:
                passes.append(Numbered(*here, Region()))
            passes[-1].region.add(i, forward)
            if len(passes) > MAX_REENTRANT:
                self.forgotten[i] = passes.popleft().number

    def recall(self, i: int) -> "Forward | None":
        """The forward that block i is run again for; None where it runs for the first time.

        Raises:
            RuntimeError: it cannot be told.
        """
        if not _in_backward():
            return None
        packs = [pack for pack in _open_checkpoints() if _is_recomputation(pack)]
        if packs:
            region = self.regions.get(_variable(packs[-1], "target_frame_ref")())
            if region is None:
                raise RuntimeError(
                    "a block of a reduced model was recomputed in backward, but it was not reduced "
                    "so when its forward ran; call reduce_ and unreduce_ before the forward"
                )
            return region.next(i, packs[-1])
        return self._recall_reentrant(i) if _is_reentrant_recomputation() else None

    def _recall_reentrant(self, i: int) -> "Forward":
        number = torch._C._current_autograd_node()._sequence_nr()
        passes = self.reentrant.get(i, ())
        if len({each.thread for each in passes}) > 1:
            raise RuntimeError(
                "re-entrant checkpoints of a reduced model were run in several threads, and a "
                "recomputed block cannot tell whose it is; pass use_reentrant=False"
            )
        found = [each.region for each in passes if each.number > number][:1]
        if not found or number < self.forgotten.get(i, -1):
            raise RuntimeError(
                "a block of a reduced model was recomputed in backward, but its forward is not "
                f"among the last {MAX_REENTRANT}; run backward sooner"
            )
        return found[0].next(i, torch._C._current_graph_task_id())


def is_recomputing() -> bool:
    """Whether what runs now is run again by a checkpoint, within a backward."""
    if not _in_backward():
        return False
    return _is_reentrant_recomputation() or any(map(_is_recomputation, _open_checkpoints()))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_reentrant_recomputation() -> bool:
    """In the backward of a re-entrant checkpoint itself, and not in a hook of any backward."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        if frame.f_code.co_qualname == "CheckpointFunction.backward":
            return True
        frame = frame.f_back
    return False


def _is_reentrant_forward() -> bool:
    """In the forward of an autograd.Function, which alone switches both modes off."""
    is_off = not torch.is_grad_enabled() and not torch._C._is_fwd_grad_enabled()
    return is_off and not torch.is_inference_mode_enabled()


def _next_number() -> int:
    return torch.autograd._get_sequence_nr()


def _open_checkpoints() -> list[Pack]:
    """The pack hooks of torch's non-re-entrant checkpoints around what runs, outermost first."""
    hooks = []
    while (pair := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(pair)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for pair in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(*pair)
    packs = (inspect.unwrap(pack) for pack, _ in reversed(hooks))
    return [pack for pack in packs if _is_forward(pack) or _is_recomputation(pack)]


def _is_forward(pack: Pack) -> bool:
    return getattr(pack, "__qualname__", "").startswith("_checkpoint_hook.")


def _is_recomputation(pack: Pack) -> bool:
    return getattr(pack, "__qualname__", "").startswith("_recomputation_hook.")


def _variable(pack: Pack, name: str) -> Any:
    """What torch's checkpoint has bound to its hook."""
    return inspect.getclosurevars(pack).nonlocals[name]
