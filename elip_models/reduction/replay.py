"""What a recomputed block must know of its forward (activation checkpointing)."""

from collections import deque
from typing import Any, NamedTuple

import torch

from elip_models.reduction.strategy import StageInfo

MAX_PASSES = 64  # forwards of a step that may still wait for their backward


class Pass(NamedTuple):
    """One forward through a step: when it began, in autograd's count; what the step before it did,
    and what it did itself, None where nothing was reduced."""

    number: int
    with_grad: bool
    before: StageInfo | None
    info: StageInfo | None


class Replay:
    """The latest passes, so that a recomputation selects what its forward selected.

    Activation checkpointing runs a block again during backward. Guidance may be gone by then, and
    scoring again would cost a second dry run. Autograd numbers its nodes in the order of the
    forward, so the node that asks for the recomputation tells which pass it belongs to:

        non-re-entrant  it stands in the pass, in the step or behind: the latest pass that began
                        before the node
        re-entrant      it is the checkpoint itself, made before the pass ran without gradient: the
                        first pass behind the node
    """

    def __init__(self) -> None:
        self.passes: deque[Pass] = deque()
        self.forgotten = -1  # the latest number that had to go

    def __getstate__(self) -> dict[str, Any]:
        return {"passes": deque(), "forgotten": -1}

    def remember(self, number: int, before: StageInfo | None, info: StageInfo | None) -> None:
        with_grad = torch.is_grad_enabled()
        if not with_grad and self.passes and self.passes[-1][:2] == (number, False):
            return  # no node stands between: it was no checkpoint, and `recall` finds the first
        self.passes.append(Pass(number, with_grad, before, info))
        if len(self.passes) > MAX_PASSES:
            self.forgotten = self.passes.popleft().number

    def recall(self) -> Pass:
        node = torch._C._current_autograd_node()
        number = node._sequence_nr()
        if "CheckpointFunction" in node.name():
            found = [p for p in self.passes if not p.with_grad and p.number > number][:1]
            known = number >= self.forgotten
        else:
            found = [p for p in self.passes if p.with_grad and p.number <= number][-1:]
            known = True
        if not found or not known:
            raise RuntimeError(
                "a block of a reduced model was recomputed in backward, but its forward is not "
                f"among the last {MAX_PASSES}; run backward sooner"
            )
        return found[0]


def next_number() -> int:
    """What autograd gives the next node of this thread."""
    return torch.autograd._get_sequence_nr()


def is_recomputed() -> bool:
    """Whether a forward that runs now is one of activation checkpointing, within a backward."""
    return torch._C._current_graph_task_id() != -1
