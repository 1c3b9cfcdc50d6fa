"""Strategies that remove image tokens behind layers of the language model."""

from dataclasses import dataclass
from typing import ClassVar

from elip_models.validation import PositiveInt, PositiveShare
from elip_models.vlm.families import Multimodal
from elip_models.vlm.strategies.base import (
    BY_CROSS_ATTENTION,
    LanguageStrategy,
    TokenCount,
    count_kept,
)


@dataclass(frozen=True)
class LayerStrategy(LanguageStrategy):
    """A way to remove image tokens inside a language model.

    Behind some layers, the image tokens that receive the least attention from the last token of the
    sequence, mean over heads, are removed. The tokens of each image are compared with each other.

    Attributes:
        name, place, summary, is_guided: as of `LanguageStrategy`. The last token of the sequence
            is one of the question, so the question changes the result.
        keep: how many tokens stay; a field of every subclass.
    """

    place: ClassVar[str] = "inside the language model"
    is_guided: ClassVar[bool] = True

    def why_unsupported(self, multimodal: Multimodal) -> str | None:
        """Return the reason why the strategy cannot reduce the model, or None."""
        if multimodal.cross_attention_layers:
            return BY_CROSS_ATTENTION
        return super().why_unsupported(multimodal) or self.why_misplaced(multimodal)

    def why_misplaced(self, multimodal: Multimodal) -> str | None:
        """Return the reason why the model has no layer for the first drop, or None."""
        depth = len(multimodal.language_model.layers)
        first = min((at for at, _ in self.drops(depth)), default=depth)
        if not 0 < first < depth:
            return f"it has to drop tokens behind one of the first {depth - 1} layers of {depth}"
        deepstack = len(getattr(multimodal.tower, "deepstack_visual_indexes", ()))
        if first < deepstack:
            return (
                f"it has to drop tokens behind layer {deepstack} or later, since the layers before "
                "it add features to every image token"
            )
        return None

    def drops(self, num_layers: int) -> tuple[tuple[int, float | int], ...]:
        """Return (layers that run before, share or number of tokens that stay), ascending."""
        raise NotImplementedError

    def kept(self, tokens: int, num_layers: int) -> tuple[int, ...]:
        """Return how many of an image's tokens each layer reads."""
        kept, counts = dict(self.drops(num_layers)), []
        for at in range(num_layers):
            tokens = count_kept(tokens, kept.get(at, 1.0))
            counts.append(tokens)
        return tuple(counts)


@dataclass(frozen=True)
class FastV(LayerStrategy):
    """Remove image tokens once (FastV, Chen et al., ECCV 2024).

    Attributes:
        layer: how many layers read every token.
        keep: the share of each image's tokens that the others read, or their number, as of
            `ImageTokenStrategy`.
    """

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "removes the tokens least attended to behind one layer"

    layer: PositiveInt = 2
    keep: PositiveShare | TokenCount = 0.5

    def drops(self, num_layers: int) -> tuple[tuple[int, float | int], ...]:
        """Return the one drop."""
        return ((self.layer, self.keep),)


@dataclass(frozen=True)
class Pyramid(LayerStrategy):
    """Remove image tokens in stages (PyramidDrop, Xing et al., CVPR 2025).

    Attributes:
        stages: equal parts of the layers; each but the last ends with a drop.
        keep: the share of the remaining tokens that stay at each drop.
    """

    name: ClassVar[str] = "pyramid"
    summary: ClassVar[str] = "removes the tokens least attended to in stages"

    stages: PositiveInt = 4
    keep: PositiveShare = 0.5

    def drops(self, num_layers: int) -> tuple[tuple[int, float], ...]:
        """Return a drop at each border of two stages."""
        borders = sorted({i * num_layers // self.stages for i in range(1, self.stages)} - {0})
        return tuple((at, self.keep) for at in borders)
