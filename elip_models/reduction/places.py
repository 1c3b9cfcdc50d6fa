"""Where the tokens of a reduced rotary model stand, told to the blocks that rotate them.

The model's own forward hands every block the rotations of all patches. After a step the later
blocks have fewer tokens: a pre-hook gives each of these its own rotation, by the places that the
step before noted.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elip_models.reduction.replay import Replay, is_recomputed

if TYPE_CHECKING:
    from elip_models.reduction.patch import _Shared


class PlacesHook:
    """The forward pre-hook on a block behind a step, and the forward hook on the last block, after
    which the places are forgotten."""

    def __init__(self, shared: "_Shared") -> None:
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
        if torch.compiler.is_compiling() and block._compiled_call_impl is not None:
            places = _outside_the_graph(self)
        else:
            places = self.places()
        if places is None:
            return None
        return args, kwargs | {"rope": shared.tower.placed(kwargs["rope"], places)}

    def places(self) -> Tensor | None:
        """(B, N-p) of the tokens that enter the block, or None where nothing was reduced."""
        if not torch.compiler.is_compiling() and is_recomputed():
            before = self.replay.recall().before
        else:
            before = self.shared.before
            if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
                self.replay.remember(before, None)
        return None if before is None else before.places


@torch.compiler.disable
def _outside_the_graph(hook: PlacesHook) -> Tensor | None:
    """In a block that is compiled by itself the places are looked up eagerly, as its step is."""
    return hook.places()


def follow_places(shared: "_Shared", first: int) -> None:
    """Hook the blocks from `first` on, and the end of the last one."""
    if not shared.tower.is_rotary:
        return
    for i in range(first, shared.tower.depth):
        shared.tower.blocks[i].register_forward_pre_hook(PlacesHook(shared), with_kwargs=True)
    shared.tower.blocks[-1].register_forward_hook(PlacesHook(shared), with_kwargs=True)
