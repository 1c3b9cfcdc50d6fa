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

    Behind some layers, it removes the image tokens that receive the least attention from the last
    token of the question, mean over heads. It compares the tokens of each image with each other.

    Attributes:
        name, place, summary, is_guided: as of `LanguageStrategy`.
        keep: how many tokens stay; a field of every subclass.
    """

    place: ClassVar[str] = "inside the language model"
    is_guided: ClassVar[bool] = True

    def why_unsupported(self, multimodal: Multimodal) -> str | None:
        if multimodal.cross_attention_layers:
            return BY_CROSS_ATTENTION
        if multimodal.recurrent_layers:
            return "it has recurrent layers, which have no attention"
        config = multimodal.text_config
        if getattr(config, "hidden_size_per_layer_input", None):
            return "its layers read further embeddings of every token"
        if getattr(config, "num_kv_shared_layers", None):
            return "its last layers read the keys and values of earlier ones"
        return super().why_unsupported(multimodal) or self.why_misplaced(multimodal)

    def why_misplaced(self, multimodal: Multimodal) -> str | None:
        """Return the reason why the model has no layer for the first drop, or None."""
        depth = len(multimodal.language_model.layers)
        first = min(self.drops(depth), default=depth)
        if not 0 < first < depth:
            return f"it has to drop tokens behind one of the first {depth - 1} layers of {depth}"
        deepstack = len(getattr(multimodal.tower, "deepstack_visual_indexes", ()))
        if first < deepstack:
            return (
                f"it has to drop tokens behind layer {deepstack} or later, since the layers before "
                "it add features to every image token"
            )
        return None

    def drops(self, num_layers: int) -> tuple[int, ...]:
        """Return how many layers run before each drop, ascending."""
        raise NotImplementedError

    def count(self, length: int, keep: float | int | None = None, further: int = 0) -> int:
        """Return how many of an image's `length` tokens stay at a drop.

        A number is what stays behind the last drop; each drop before removes the same share.

        Args:
            length: the tokens before the drop.
            keep: in place of the strategy's own.
            further: the number of drops behind it.
        """
        keep = self.keep if keep is None else keep
        if isinstance(keep, int) and further and keep < length:
            keep = round(length * (keep / length) ** (1 / (further + 1)))
        return count_kept(length, keep)

    def kept(
        self, tokens: int, num_layers: int, keep: float | int | None = None
    ) -> tuple[int, ...]:
        """Return how many of an image's tokens each layer reads, by `keep` or the strategy's own.

        Args:
            tokens: the tokens before the first layer.
            num_layers: of the language model.
            keep: as of `count`.
        """
        drops, counts = self.drops(num_layers), []
        for at in range(num_layers):
            if at in drops:
                tokens = self.count(tokens, keep, further=len(drops) - drops.index(at) - 1)
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

    def drops(self, num_layers: int) -> tuple[int, ...]:
        """Return the one drop."""
        return (self.layer,)


@dataclass(frozen=True)
class Pyramid(LayerStrategy):
    """Remove image tokens in stages (PyramidDrop, Xing et al., CVPR 2025).

    Attributes:
        stages: equal parts of the layers; each but the last ends with a drop.
        keep: the share of the remaining tokens that stay at each drop, or the number of each
            image's tokens that stay behind the last one.
    """

    name: ClassVar[str] = "pyramid"
    summary: ClassVar[str] = "removes the tokens least attended to in stages"

    stages: PositiveInt = 4
    keep: PositiveShare | TokenCount = 0.5

    def drops(self, num_layers: int) -> tuple[int, ...]:
        """Return a drop at each border of two stages."""
        return tuple(sorted({i * num_layers // self.stages for i in range(1, self.stages)} - {0}))
