"""The settings of a reduced model, which deepcopy and pickle copy with it.

They know nothing of forward passes: `EagerPasses`, `GraphPass` and the hooks refer to them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from elip_models.call_context import Block, Pairing, drop_guide, records_of, set_guide, within
from elip_models.strategies.strategy import Strategy
from elip_models.strategies.summary import Summary
from elip_models.towers import ImageTextModel, Tower
from elip_models.towers.tower_parts import is_gone, strongly, weakly

LARGE = 2**20  # patches: no keep ratio below 1 rounds to all of them


class GraphGuidance:
    """The guidance that graphs of a reduced model read; its attributes are plain, for guards.

    guides, text_cls: the texts by the id of their owner, and the most recent text; a thread
        changes them, and the next two, under `lock`.
    pairings, is_paired: the owners of `guidance(model, paired=True)`, and whether there is one.
    own_text: the text that the whole model's forward has encoded.
    has_own_mask: in torch.export, the model makes a mask that hides no token, see `with_masks`.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.guides: dict[int, Tensor] = {}
        self.text_cls: Tensor | None = None
        self.pairings: set[int] = set()
        self.is_paired = False
        self.own_text: Tensor | None = None
        self.has_own_mask = False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copy without guidance."""
        return GraphGuidance, ()


@dataclass(eq=False)
class Reduction:
    """The settings of a reduced model, and its guidance.

    image_text: the whole model, if it was reduced.
    shared_config: the library's config, which a copy with the strategy's settings replaces.
    graph: the guidance that graphs read.
    acts_at: the blocks that a step changes. first, last: the first and the last reduced block.
    """

    tower: Tower
    strategy: Strategy
    image_text: ImageTextModel | None = None
    shared_config: Any = None
    graph: GraphGuidance = field(default_factory=GraphGuidance)

    def __post_init__(self) -> None:
        vars(self).update(self._holders(weakly))
        tower, strategy = self.tower, self.strategy
        # an embedding that the strategy changes has one size, blocks may get images of any
        size = tower.size if strategy.changes_embedding else tower.size._replace(num_patches=LARGE)
        stages = tuple(stage.first for stage in strategy.stages(size))
        self.acts_at = stages
        if stages and (strategy.replaces_later or tower.has_positions):
            self.acts_at = tuple(range(stages[0], tower.depth))
        self.first, self.last = min(stages, default=tower.depth), tower.depth - 1
        if self.acts_at:
            _refuse_repeated(list(tower.blocks))

    def _holders(self, refer: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the attributes that refer to modules of the model, which owns the reduction."""
        return {
            "tower": refer(self.tower),
            "image_text": None if self.image_text is None else refer(self.image_text),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle is made of, modules included."""
        return vars(self) | self._holders(strongly)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled reduction, which its model owns."""
        vars(self).update(state)
        vars(self).update(self._holders(weakly))

    @property
    def model(self) -> nn.Module:
        """Return the model that was reduced: the whole model, or an image model alone."""
        return (self.image_text or self.tower).model

    @property
    def wholes(self) -> list[nn.Module]:
        """Return the whole model and the image model, without those that were deleted."""
        holders = (self.image_text, self.tower)
        return [holder.model for holder in holders if holder and not is_gone(holder, "model")]

    @property
    def shares_forward(self) -> bool:
        """Return whether blocks in a graph read the results of earlier blocks."""
        tower, strategy = self.tower, self.strategy
        needs_positions = tower.has_positions or tower.has_dynamic_size or tower.pools
        needs_sizes = strategy.replaces_block or strategy.merge == "nearest"
        return needs_positions or needs_sizes

    @property
    def summary(self) -> Summary:
        """Return the summary of the reduction."""
        return Summary.of(self.tower, self.strategy, is_whole=self.image_text is not None)

    def __str__(self) -> str:
        """Return the summary in one line."""
        return self.summary.line

    @property
    def is_installed(self) -> bool:
        """Return whether the model's blocks are still reduced by it."""
        method = vars(self.tower.blocks[self.last]).get("forward")
        return getattr(method, "reduction", None) is self

    @property
    def is_in_use(self) -> bool:
        """Return whether it is guided, or recorded in this thread or task."""
        return bool(self.graph.guides or self.graph.pairings or records_of(self))

    @contextmanager
    def guided(self, text_cls: Tensor) -> Iterator[None]:
        """Guide the forward passes of this thread or task by text_cls (B, D)."""
        owner, graph = Block(), self.graph
        set_guide(self, text_cls, owner)
        with graph.lock:
            graph.guides[id(owner)] = graph.text_cls = text_cls
        try:
            yield
        finally:
            drop_guide(owner)
            with graph.lock:
                del graph.guides[id(owner)]
                graph.text_cls = next(reversed(graph.guides.values()), None)

    @contextmanager
    def paired(self) -> Iterator[None]:
        """Let text i guide image i in the calls of the whole model in this thread or task."""
        pairing, graph = Pairing(self), self.graph
        with graph.lock:
            graph.pairings.add(id(pairing))
            graph.is_paired = True
        try:
            with within(pairing):
                yield
        finally:
            with graph.lock:
                graph.pairings.discard(id(pairing))
                graph.is_paired = bool(graph.pairings)


def _refuse_repeated(blocks: list[nn.Module]) -> None:
    """Raise if a module is used as two blocks: its replaced forward has one index."""
    for i, block in enumerate(blocks):
        first = next(j for j, other in enumerate(blocks) if other is block)
        if first < i:
            raise TypeError(
                f"model: expected blocks that are each a module of their own, got block {i} that "
                f"is block {first} again; give it a copy.deepcopy of it first"
            )
