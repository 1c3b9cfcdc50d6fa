"""Where the tokens of a reduced rotary model stand, told to the blocks that rotate them.

The model's own forward hands every block the rotations of all patches. After a step the later
blocks have fewer tokens: a pre-hook gives each of these its own rotation, by the places that the
step before noted.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elip_models.reduction.replay import Replay, is_recomputed, next_number
from elip_models.reduction.strategy import StageInfo

if TYPE_CHECKING:
    from elip_models.reduction.hooks import Shared


class PlacesHook:
    """The forward pre-hook on a block behind a step, and the forward hook on the last block, after
    which the places are forgotten."""

    def __init__(self, shared: "Shared") -> None:
        self.shared = shared
        self.replay = Replay()

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        shared = self.shared
        if shared.scoring:  # the tower knows the places of its dry run
            return None
        if output:
            shared.before = None
            return None
        whole = torch.compiler.is_compiling() and block._compiled_call_impl is None
        before = shared.before if whole else self.recall()
        if before is None:
            return None
        return args, shared.tower.moved(kwargs, before.positions)

    @torch.compiler.disable
    def recall(self) -> StageInfo | None:
        """What the step before did, or did in the forward that is recomputed; None for nothing.

        In a block that is compiled by itself it is looked up outside the graph, as its step is.
        """
        if is_recomputed():
            return self.replay.recall().before
        if not torch.is_inference_mode_enabled():
            self.replay.remember(next_number(), self.shared.before, None)
        return self.shared.before


def follow_places(shared: "Shared", first: int) -> None:
    """Hook the blocks from `first` on, and the end of the last one."""
    if not shared.tower.is_rotary:
        return
    for i in range(first, shared.tower.depth):
        shared.tower.blocks[i].register_forward_pre_hook(PlacesHook(shared), with_kwargs=True)
    shared.tower.blocks[-1].register_forward_hook(PlacesHook(shared), with_kwargs=True)
