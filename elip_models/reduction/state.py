"""What is known of a reduced model: how it is reduced, and the forwards that run now.

It is plain attributes, so that it follows the model through deepcopy and pickle, and is an ordinary
guard for the compiler. What belongs to one forward is in its `Forward`, which stays with the thread
that runs it, and with the graph that may recompute it.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elip_models.reduction.caching import UnguidedWarning, warn_once
from elip_models.reduction.checkpoint_replay import Replay
from elip_models.reduction.dense_outputs import is_on_grid
from elip_models.reduction.guidance import drop_guide, guide_of, own_guidance, set_guide
from elip_models.reduction.step import Forward, Step
from elip_models.reduction.strategy import StageInfo, Strategy, blocks_of
from elip_models.reduction.summary import Summary
from elip_models.towers import ImageTextModel, Tower

Records = tuple[tuple[Sequence["Reduction"], list[StageInfo]], ...]

RECORDS: ContextVar[Records] = ContextVar("RECORDS", default=())
"""Who records which reductions' steps in this thread or task, and where to."""


@dataclass(eq=False)
class Reduction:
    """How a model is reduced, and the forwards that run now.

    image_text: the whole model that was reduced, if it was.
    running: the forwards by thread. replay: those that a checkpoint may recompute.
    guides, text_cls: for graphs, by whom each text was set, and the latest.
    own_text: for graphs, what the whole model's forward has made its text.
    forward, on_grid: for graphs, the one that runs, and whether it is.
    shared_config: the library's, in whose place the model has a copy that notes the reduction.
    """

    tower: Tower
    strategy: Strategy
    image_text: ImageTextModel | None = None
    running: dict[int, Forward] = field(default_factory=dict)
    replay: Replay = field(default_factory=Replay)
    guides: dict[int, Tensor] = field(default_factory=dict)
    text_cls: Tensor | None = None
    own_text: Tensor | None = None
    forward: Forward | None = None
    on_grid: bool = False
    shared_config: Any = None

    def __post_init__(self) -> None:
        tower, strategy = self.tower, self.strategy
        stages = blocks_of(strategy, tower.size)
        self.acts_at = stages
        if stages and (strategy.replaces_later or tower.is_rotary):
            self.acts_at = tuple(range(stages[0], tower.depth))
        self.first, self.last = min(stages, default=tower.depth), tower.depth - 1
        if self.acts_at:
            _refuse_repeated(list(tower.blocks))

    @property
    def model(self) -> nn.Module:
        """What is reduced: the whole model, or an image model alone."""
        return (self.image_text or self.tower).model

    @property
    def carries(self) -> bool:
        """A block needs to know what those before it did."""
        tower, strategy = self.tower, self.strategy
        is_placed = tower.is_rotary or tower.has_dynamic_size or tower.pools
        weighs = strategy.replaces_block or strategy.merge == "nearest"
        return is_placed or weighs or self.on_grid

    @property
    def summary(self) -> Summary:
        """What it comes to."""
        return Summary.of(self.tower, self.strategy, is_whole=self.image_text is not None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not guided, and has run nothing."""
        idle = {"running": {}, "guides": {}, "text_cls": None, "own_text": None}
        return vars(self) | idle | {"forward": None, "on_grid": False}

    def guide(self, by: object, text_cls: Tensor) -> None:
        """This thread's or task's forwards are guided by text_cls (B, D)."""
        set_guide(self, text_cls, by)
        self.guides[id(by)] = self.text_cls = text_cls

    def unguide(self, by: object) -> None:
        """They are guided as before."""
        drop_guide(by)
        del self.guides[id(by)]
        self.text_cls = next(reversed(self.guides.values()), None)

    def begin(self, i: int, tokens: Tensor) -> Forward:
        """A forward, guided as this thread or task says, whose `tokens` enter block i."""
        text = self._guidance()
        forward = Forward(
            self.tower,
            self.strategy,
            text,
            num_tokens=tokens.shape[1] if i == self.first else None,
            on_grid=is_on_grid(self),
        )
        if forward.on_grid and forward.stages:
            self._check_pooling()
        if text is None and self.image_text is not None and forward.stages:
            self._say_unguided()
        return forward

    def _check_pooling(self) -> None:
        """What the model pools of a grid is what it pools of the tokens."""
        if self.tower.pools and not self.strategy.merge:
            raise ValueError(
                f"model: expected one that pools all of its patches, or none, to return the tokens "
                f"of several blocks under {self.strategy.name!r}, got a "
                f"{type(self.tower.model).__name__} that pools those which are left; unreduce_ it "
                "first"
            )

    def _guidance(self) -> Tensor | None:
        if not torch.compiler.is_compiling():
            guide = guide_of(self)
            return None if guide is None else guide.text_cls
        text = self.text_cls if self.own_text is None else self.own_text
        if text is not None and not torch.compiler.is_exporting():
            text = own_guidance(text)
        return text

    def _say_unguided(self) -> None:
        if self.strategy.is_guided and not torch.compiler.is_compiling():
            warn_once(
                "the images came alone, or with another number of texts, so they are reduced by "
                "the image alone (without_text='vision'); guidance(model, text_cls) guides them, "
                "without_text='dense' leaves them as they were",
                UnguidedWarning,
            )

    def step(self, i: int, tokens: Tensor) -> Step:
        """What the strategy makes of the tokens that enter block i, in the forward that runs."""
        if torch.compiler.is_compiling():
            return self._step_in_graph(i, tokens)
        thread = threading.get_ident()
        forward = self.replay.recall(i)
        if forward is None:
            forward = self.running.get(thread)
            if forward is None or i == self.first:
                forward = self.running[thread] = self.begin(i, tokens)
            if i == self.last:
                del self.running[thread]
        self.replay.remember(i, forward)
        try:
            step = forward.step(i, tokens)
        except BaseException:
            self.running.pop(thread, None)
            raise
        if step.info is not None and i not in forward.infos:
            self._record(step.info)
        return self._noted(i, forward, step)

    def _record(self, info: StageInfo) -> None:
        """Tells who records in this thread or task."""
        for reductions, infos in RECORDS.get():
            if any(reduction is self for reduction in reductions):
                infos.append(info)

    def _step_in_graph(self, i: int, tokens: Tensor) -> Step:
        """Blocks that know nothing of one another share nothing: they may be checkpointed."""
        if not self.carries:
            acts = i in self.acts_at
            return self.begin(i, tokens).step(i, tokens) if acts else Step(tokens)
        if self.forward is None or i == self.first:
            self.forward = self.begin(i, tokens)
        forward = self.forward
        if i == self.last:
            self.forward = None
        return self._noted(i, forward, forward.step(i, tokens))

    def _noted(self, i: int, forward: Forward, step: Step) -> Step:
        """The forward knows of the step; where it leaves a grid, so does the block."""
        if step.info is not None:
            forward.infos[i], forward.slots[i] = step.info, step.slots
        return step if forward.leaves_grid(i) else step._replace(slots=None)


def _refuse_repeated(blocks: list[nn.Module]) -> None:
    """The stand-in of a block's forward knows one place."""
    for i, block in enumerate(blocks):
        first = next(j for j, other in enumerate(blocks) if other is block)
        if first < i:
            raise TypeError(
                f"model: expected blocks that are each a module of their own, got block {i} that "
                f"is block {first} again; give it a copy.deepcopy of it first"
            )


@contextmanager
def recording(reductions: Sequence[Reduction], infos: list[StageInfo]) -> Iterator[None]:
    """Inside, `infos` is told of each step of the reductions in this thread or task."""
    this = reductions, infos
    RECORDS.set((*RECORDS.get(), this))
    try:
        yield
    finally:
        RECORDS.set(tuple(each for each in RECORDS.get() if each is not this))


def is_in_use(reduction: Reduction) -> bool:
    """Somebody guides it, or records it in this thread or task."""
    recorded = any(reduction is each for reductions, _ in RECORDS.get() for each in reductions)
    return recorded or bool(reduction.guides)
