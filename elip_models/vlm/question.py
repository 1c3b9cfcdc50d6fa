"""The question of an image, by whose text a strategy selects tokens of the image.

It is what `generate` reads as the prompt: the text before the first label behind the image. Without
labels, it is the mask of `guidance(model, question=mask)`. Without a mask, it is all text before
the tokens that the call predicts, which `logits_to_keep` counts.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from elip_models.call_context import items, latest, put, take

IGNORED = -100  # the label of a token that is not predicted


class Mask(NamedTuple):
    """The tokens (B, N) bool of the question, for the model with these hooks."""

    hooks: object
    tokens: Tensor


class Prediction(NamedTuple):
    """What a forward pass predicts beside the next token.

    labels: (B, N), of the loss that it will compute, or None.
    count: how many of the last tokens it predicts, or None if the call does not tell.
    """

    labels: Tensor | None = None
    count: int | None = None


def note_prediction(kwargs: dict[str, Any]) -> None:
    """Note what a call of the model, with these arguments, predicts beside the next token.

    Assisted decoding asks for the logits of its candidates, and a trainer for those of an answer.
    """
    logits = kwargs.get("logits_to_keep")
    count = logits - 1 if isinstance(logits, int) and logits > 0 else None
    put(Prediction(kwargs.get("labels"), count))


def forget_prediction() -> None:
    """Forget it."""
    take(Prediction)


def prediction() -> Prediction:
    """Return what is noted."""
    return latest(Prediction) or Prediction()


def is_known(hooks: object) -> bool:
    """Return whether the call tells which tokens belong to no question."""
    return prediction().count is not None or is_marked(hooks)


def is_marked(hooks: object) -> bool:
    """Return whether a mask marks the question for the model with these hooks."""
    return any(mask.hooks is hooks for mask in items(Mask))


@dataclass(frozen=True)
class Question:
    """The questions of the images in a batch of sequences.

    text: (B, N) bool, the tokens of text that can belong to a question.
    last: (B, N) int64, the last token of the question of an image that begins at each position.
    """

    text: Tensor
    last: Tensor

    @classmethod
    def of(cls, hooks: object, images: Tensor, mask: Tensor | None) -> Self:
        """Return the questions of a forward pass.

        Args:
            hooks: those of the model.
            images: (B, N) bool, the image tokens.
            mask: (B, K) the attention mask of all cached and new tokens, or None.
        """
        length, (labels, count) = images.shape[1], prediction()
        places = torch.arange(length, device=images.device).expand_as(images)
        real = torch.ones_like(images) if mask is None else mask[:, -length:].bool()
        ends = torch.full_like(places, length)
        if labels is not None and labels.shape == images.shape:
            is_answer = (labels.to(images.device) != IGNORED) & ~images
            ends = places.where(is_answer, length).flip(1).cummin(1).values.flip(1)
        elif marked := [mask.tokens for mask in items(Mask) if mask.hooks is hooks][-1:]:
            real = real & _fitted(marked[0], images)
        elif count:
            real = real & (places < length - count)
        latest = places.where(real, 0).cummax(1).values
        return cls(real & ~images, latest.gather(1, (ends - 1).clamp(min=0)))

    def means(self, embeds: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
        """Return (R, D), the mean embedding of the question of each image.

        Args:
            embeds: (B, N, D) the embeddings of all tokens.
            rows: (R,) the sequence of each image.
            starts: (R,) the position of the first token of each image.
        """
        ends = torch.stack((rows, self.last[rows, starts]))
        (rows, last), index = ends.unique(dim=1, return_inverse=True)
        places = torch.arange(embeds.shape[1], device=embeds.device)
        weights = (self.text[rows] & (places <= last[:, None])).to(embeds.dtype).unsqueeze(-1)
        means = (embeds[rows] * weights).sum(1) / weights.sum(1).clamp(min=1)
        return means[index]


def _fitted(tokens: Tensor, images: Tensor) -> Tensor:
    """Return the question's tokens (B, N) for a batch with beams, or with generated tokens."""
    (rows, length), (batch, width) = tokens.shape, images.shape
    if batch % rows or length > width:
        raise ValueError(
            f"question: expected ({batch}, {width}), a row for each sequence and at most its "
            f"tokens, got {tuple(tokens.shape)}; pass the mask of this prompt"
        )
    fitted = torch.zeros_like(images)
    fitted[:, :length] = tokens.to(images.device).repeat_interleave(batch // rows, 0)
    return fitted
