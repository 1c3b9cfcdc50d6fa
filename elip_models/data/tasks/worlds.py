"""What the built-in worlds of the tasks share: examples made of staged scenes.

Each text comes several times in a row, with other images and another answer each time, so that no
text alone says its answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np

from elip_models.data.checks import check_index
from elip_models.data.examples import Example
from elip_models.data.scenes import EmojiScenes, render
from elip_models.data.world import Scene, textured


class Asked(NamedTuple):
    """A text, its answers as of `Example`, and `stage`, which draws scenes where they are right."""

    text: str
    answers: dict[str, float]
    stage: Callable[[np.random.Generator], tuple[Scene, ...]]


class EmojiExamples(ABC):
    """An `ExampleSource` of `size` examples, drawn on the fly.

    Example `index` depends on (seed, index) and the options alone, so a longer source begins with a
    shorter one. The options are those of `EmojiScenes`, and raise alike.
    """

    name: ClassVar[str]
    answers: ClassVar[tuple[str, ...]]
    turns: ClassVar[int]
    """How often each text comes, one after the other."""
    stream: ClassVar[int]
    """Keeps the random numbers apart from those of the other worlds."""

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        image_size: int = 64,
        clutter: int = 0,
        textures: bool = False,
    ) -> None:
        options = {"seed": seed, "image_size": image_size, "clutter": clutter}
        self.options = EmojiScenes(size, **options, textures=textures)

    def __len__(self) -> int:
        return len(self.options)

    def __getitem__(self, index: int) -> Example:
        scenes, size = self.scenes(index), self.options.image_size
        return self.text_alone(index)._replace(images=tuple(render(each, size) for each in scenes))

    def text_alone(self, index: int) -> Example:
        """The example with no image, and none drawn."""
        text, answers, _ = self._asked(index)
        return Example((), text, answers, f"{self.name}-{self.options.seed}-{index}")

    def scenes(self, index: int) -> tuple[Scene, ...]:
        """What its images show, as data, not drawn."""
        rng = self._rng(index, 1)
        scenes = self._asked(index).stage(rng)
        return tuple(textured(each, rng) for each in scenes) if self.options.textures else scenes

    def _asked(self, index: int) -> Asked:
        check_index(index, len(self))
        number, turn = divmod(index, self.turns)
        return self._ask(number, turn, self._rng(number))

    @abstractmethod
    def _ask(self, number: int, turn: int, rng: np.random.Generator) -> Asked:
        """The `number`-th text, which `rng` draws, as it is answered the `turn`-th time."""

    def _rng(self, number: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng((self.options.seed, number, self.stream, *stream))
