"""The base class of strategies that select image tokens for a language model."""

import sys
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from elip_models.strategies.flops import share_for
from elip_models.strategies.strategy import strategy_text
from elip_models.validation import (
    Bounds,
    PositiveShare,
    check_fields,
    mismatch_error,
    plain_number,
    shortened,
)
from elip_models.vlm.clips import VideoLayout
from elip_models.vlm.families import PATCH_TOKENS, Multimodal
from elip_models.vlm.tower_attention import attention_of

TokenCount = Annotated[int, Bounds(2, sys.maxsize)]
BY_CROSS_ATTENTION = "it reads image tokens by cross-attention, so that the prompt has none"


class ImageContext(NamedTuple):
    """What a strategy may read beside the tokens of R images.

    question: (R, D) the mean embedding of the question of each image, if it `reads_question`.
    attention: (R, n) the attention that each patch receives in the image tower, if it
        `reads_tower`: from the class token, or from all patches if there is none.
    keys: (R, n, d) the keys of that attention, mean over heads.
    frame: the tokens of a frame, if the images are clips.
    always: the positions in the image whose tokens have to stay.
    generator: of random numbers; None for that of the tokens' device.
    """

    question: Tensor | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    frame: int | None = None
    always: tuple[int, ...] = (-1,)
    generator: torch.Generator | None = None

    def of(self, indices: list[int]) -> "ImageContext":
        """Return the context of these of the R images."""
        question, attention, keys = (None if t is None else t[indices] for t in self[:3])
        return self._replace(question=question, attention=attention, keys=keys)


@dataclass(frozen=True)
class LanguageStrategy:
    """A way to remove image tokens that a language model reads.

    Attributes:
        name: the key in `LANGUAGE_STRATEGIES`, which no strategy of image towers has.
        place: where tokens are removed.
        summary: what the strategy does, in at most ten words.
        is_guided: the question changes the result with the default settings.
        keep: how many tokens stay, a field of a subclass; None if the image alone decides.
        reads_tower: it reads the attention of the image tower.
        joins_frames, reads_frames: as of `ImageTokenStrategy`.
    """

    name: ClassVar[str]
    place: ClassVar[str]
    summary: ClassVar[str]
    is_guided: ClassVar[bool] = False
    reads_tower: ClassVar[bool] = False
    joins_frames: ClassVar[bool] = False
    reads_frames: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the fields."""
        hint = {field.name: field.type for field in fields(self)}.get("keep")
        if hint is not None:
            _check_keep(plain_number(self.keep), hint)
        check_fields(self)

    def __str__(self) -> str:
        """Return the name, the number of tokens, and the settings that are not the default."""
        return strategy_text(self, "keep")

    @property
    def reads_question(self) -> bool:
        """Return whether the question changes the result."""
        return self.is_guided

    @property
    def why_whole(self) -> str | None:
        """Return what the strategy reads of the whole prompt, or None if each image alone."""
        if self.reads_question:
            return "reads the question, which another chunk may have"
        if self.reads_tower:
            return "reads the attention of the image tower, which a chunk does not have"
        return None

    def why_unsupported(self, multimodal: Multimodal) -> str | None:
        """Return the reason why the strategy cannot reduce the model, or None."""
        return multimodal.why_tokens_must_stay


@dataclass(frozen=True)
class ImageTokenStrategy(LanguageStrategy):
    """A way to select the image tokens that a language model reads.

    A subclass defines `select`, or `reduce` if it also changes the tokens. Images are reduced
    independently of each other: a result does not depend on the batch. A strategy that
    `joins_frames` selects from a whole clip, also if the model writes text between the frames. One
    that `reads_frames` compares them, and keeps every token of still images.

    Attributes:
        name, place, summary, is_guided: as of `LanguageStrategy`.
        keep: a float is the share of each image's tokens, in (0, 1]; an int is their number, at
            least 2. An image is a run of image tokens without others between them: a tile or a
            frame, if the model separates these by other tokens.
    """

    place: ClassVar[str] = "before the language model"

    keep: PositiveShare | TokenCount = 0.5

    def why_unsupported(self, multimodal: Multimodal) -> str | None:
        if self.reads_frames and VideoLayout.of(multimodal) is None:
            return "it has no clips of comparable frames: it reads images, or each frame as one"
        if self.reads_tower and multimodal.cross_attention_layers:
            return BY_CROSS_ATTENTION
        if self.reads_tower and multimodal.config.model_type not in PATCH_TOKENS:
            return "its image tokens are not the patches of its image tower, one each"
        if self.reads_tower and attention_of(multimodal) is None:
            tower = type(multimodal.tower).__name__
            return (
                f"its image tower, {tower}, is not like that of LLaVA, whose attention "
                f"{self.name!r} can read"
            )
        return super().why_unsupported(multimodal)

    def count(self, length: int, keep: float | int | None = None) -> int:
        """Return how many of an image's `length` tokens stay, by `keep` or the strategy's own."""
        return count_kept(length, self.keep if keep is None else keep)

    def select(self, tokens: Tensor, count: int, context: ImageContext) -> Tensor:
        """Select `count` tokens of each image, the most important first.

        Args:
            tokens: (R, n, D) the features of R images in the width of the language model.
            count: from 1 to n - 1.
            context: what else is known of the images.

        Returns:
            (R, count) int64, positions in the image.
        """
        raise NotImplementedError

    def reduce(
        self, tokens: Tensor, count: int, context: ImageContext
    ) -> tuple[Tensor, Tensor | None]:
        """Return the positions (R, count) that stay, and their new features or None.

        The tokens that have to stay take the places of the least important ones.
        """
        chosen, (R, n, _) = self.select(tokens.detach(), count, context), tokens.shape
        order = torch.arange(count, device=tokens.device).expand(R, -1)
        rank = order.new_full((R, n), count).scatter(1, chosen, order)
        rank[:, list(context.always)] = -1
        return rank.argsort(dim=1, stable=True)[:, :count], None

    def flops(self, length: int, width: int) -> int:
        """Return the FLOPs of the selection for an image of `length` tokens."""
        return 0


def count_kept(length: int, keep: float | int) -> int:
    """Return how many of `length` tokens stay: a share of them, or a number."""
    kept = keep if isinstance(keep, int) else round(keep * length)
    return min(max(kept, 1), length)


def _check_keep(keep: Any, hint: Any) -> None:
    """Raise TypeError or ValueError unless `keep` is of the type `hint`: a share, or a number too.

    The int 1 is an error: it is one token, and not a share of 1.0.
    """
    is_one = isinstance(keep, int) and keep == 1
    error = mismatch_error(keep, hint) or (ValueError if is_one else None)
    if error is not None:
        or_number = "" if hint is PositiveShare else ", or an int of at least 2 for their number"
        one = ", one token" if is_one and keep is not True else ""
        raise error(
            f"keep: expected a float in (0, 1] for a share of the tokens{or_number}, got "
            f"{shortened(keep)}{one}; pass {share_for(keep)} of them"
        )
