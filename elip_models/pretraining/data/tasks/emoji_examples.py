"""The base class of the built-in data of the tasks, which draw emoji scenes.

`EmojiExamples` repeats each text several times in a row, with other images and another answer each
time. The text alone therefore does not predict its answer.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from elip_models.pretraining.data.checks import check_index
from elip_models.pretraining.data.examples import Example
from elip_models.pretraining.data.scene_sampling import (
    NAMES,
    SIDES,
    Scene,
    add_texture,
    place_names,
    sample_scene,
)
from elip_models.pretraining.data.scenes import EmojiData, render


class ExampleSampler:
    """The random choices of one example: those of its text and answer, and those of its scenes.

    All repetitions of a text make the same choices for the text.
    """

    def __init__(self, data: "EmojiExamples", index: int) -> None:
        number, self.turn = divmod(index, data.turns)
        self.turns, self.clutter = data.turns, data.clutter
        self.text, self.rng = data.random(number), data.random(number, self.turn)

    def names(self, count: int) -> list[str]:
        """Return different emoji for the text."""
        return self.text.sample(NAMES, count)

    def side(self) -> str:
        """Return one of `SIDES` for the text."""
        return self.text.choice(SIDES)

    def place(self) -> str:
        """Return a place for the text."""
        return self.text.choice(place_names(self.clutter))

    def answer(self, answers: Sequence[str]) -> str:
        """Return one of the answers, drawn uniformly; each repetition gets another one."""
        return self.text.sample(answers, self.turns)[self.turn]

    def another(self, values: Sequence[Any], value: Any) -> Any:
        """Return one of the values other than `value`, for a scene."""
        return self.rng.choice([other for other in values if other != value])

    def scene(self, **options: Any) -> Scene:
        """Draw a scene with the options of `sample_scene`."""
        return sample_scene(self.rng, self.clutter, **options)

    def related(self, names: Sequence[str], side: str, **options: Any) -> Scene:
        """Draw scenes until the first of two single emoji is on a side of the second."""
        while True:
            scene = self.scene(names=names, counts=(1, 1), **options)
            if scene.groups[0].is_beside(scene.groups[1], side):
                return scene

    def with_count(self, name: str, count: int) -> Scene:
        """Draw a scene with `count` copies of an emoji, 0 to 3.

        They form one group, or one group each in a scene with clutter.
        """
        if count == 0:
            return self.scene(absent=[name])
        return self.scene(names=[name] * (count if self.clutter else 1), counts=[count])


class EmojiExamples(EmojiData):
    """An `ExampleSource`; the arguments are those of `EmojiData`.

    The forms of texts take turns. All answers of a form are equally probable.
    """

    answers: ClassVar[tuple[str, ...]]
    turns: ClassVar[int] = 2
    """Number of consecutive examples with the same text."""
    forms: ClassVar[Sequence[Callable[[ExampleSampler], tuple[str, str, tuple[Scene, ...]]]]]
    """Functions that return a text, its answer, and scenes for which the answer is correct."""

    def __getitem__(self, index: int) -> Example:
        example, scenes = self._draw(index)
        return example._replace(images=tuple(render(scene, self.image_size) for scene in scenes))

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is drawn."""
        return self._draw(index)[0]

    def scenes(self, index: int) -> tuple[Scene, ...]:
        """Return the scenes of the images as data, without drawing them."""
        return self._draw(index)[1]

    def _draw(self, index: int) -> tuple[Example, tuple[Scene, ...]]:
        check_index(index, self.size)
        sampler = ExampleSampler(self, index)
        text, answer, scenes = self.forms[index // self.turns % len(self.forms)](sampler)
        if self.textures:
            scenes = tuple(add_texture(sampler.rng, scene) for scene in scenes)
        answers = {answer: 1.0} if self.answers else {}
        return Example((), text, answers, self.sample_id(index)), scenes
