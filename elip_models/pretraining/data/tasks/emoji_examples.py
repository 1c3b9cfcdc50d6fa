"""Base classes of the built-in data of the tasks, which draw emoji scenes.

`EmojiExamples` repeats each text several times in a row, with other images and another answer each
time. The text alone therefore does not predict its answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np

from elip_models.pretraining.data.checks import check_index
from elip_models.pretraining.data.examples import Example
from elip_models.pretraining.data.scene_sampling import Scene, add_texture
from elip_models.pretraining.data.scenes import EmojiScenes, render


class SceneExample(NamedTuple):
    """A text with its answers, as in `Example`, and a function that draws scenes for them."""

    text: str
    answers: dict[str, float]
    sample: Callable[[np.random.Generator], tuple[Scene, ...]]  # scenes with these answers


class EmojiTaskData:
    """The options and random generators of the built-in data of a task, with `size` examples.

    The other arguments and errors are those of `EmojiScenes`.
    """

    stream: ClassVar[int]
    """Part of the random seed that is unique to each subclass."""

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

    def _rng(self, number: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng((self.options.seed, number, self.stream, *stream))


class EmojiExamples(EmojiTaskData, ABC):
    """An `ExampleSource` of `size` examples, drawn on the fly.

    Example `index` depends on (seed, index) and the options only. A longer source therefore begins
    with the examples of a shorter one. The other arguments and errors are those of `EmojiScenes`.
    """

    name: ClassVar[str]
    answers: ClassVar[tuple[str, ...]]
    turns: ClassVar[int]
    """Number of consecutive examples with the same text."""

    def __len__(self) -> int:
        return len(self.options)

    def __getitem__(self, index: int) -> Example:
        scenes, size = self.scenes(index), self.options.image_size
        return self.text_alone(index)._replace(images=tuple(render(each, size) for each in scenes))

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is drawn."""
        text, answers, _ = self._example_at(index)
        return Example((), text, answers, f"{self.name}-{self.options.seed}-{index}")

    def scenes(self, index: int) -> tuple[Scene, ...]:
        """Return the scenes of the images as data, without drawing them."""
        rng = self._rng(index, 1)
        scenes = self._example_at(index).sample(rng)
        return tuple(add_texture(each, rng) for each in scenes) if self.options.textures else scenes

    def _example_at(self, index: int) -> SceneExample:
        check_index(index, len(self))
        number, turn = divmod(index, self.turns)
        return self._make_example(number, turn, self._rng(number))

    @abstractmethod
    def _make_example(self, number: int, turn: int, rng: np.random.Generator) -> SceneExample:
        """Return the `number`-th text, drawn from `rng`, with its answers in repetition `turn`."""
