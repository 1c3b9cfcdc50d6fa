"""Scores of pairs of an image and a text: image-text matching, or the cosine of features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.pretraining.tasks.features import Progress, encode_texts, no_progress
from elip_models.reduction.encode import run_tower

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.models.base import PretrainedModel

Method = Literal["features", "itm"]


class Encoded(NamedTuple):
    """Image tokens (I, N, D) and their mask (I, N), or features (I, E) fp32 and None."""

    values: Tensor
    mask: Tensor | None


@dataclass
class PairScorer:
    """Scores of pairs of images and `texts`, `batch_size` pairs in a forward pass."""

    model: "PretrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    texts: Sequence[str]
    method: Method
    batch_size: int
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        tokens = self.model.tokenise(self.tokenizer, self.texts)
        self.ids, self.mask = tokens["input_ids"], tokens["attention_mask"]
        if self.method == "features":
            read = self.model, self.tokenizer, list(self.texts), self.batch_size
            self.features = encode_texts(*read, self.progress)

    def encode(self, images: Tensor, text_cls: Tensor | None = None) -> Encoded:
        """Encode images (B, 3, S, S); the texts (B, D) guide the reduction."""
        model = self.model
        if self.method == "itm":
            return Encoded(*model.encode_masked(images, text_cls))
        if text_cls is None:
            return Encoded(model.image_features(images).float(), None)
        tokens, _ = run_tower(model.tower, images, text_cls, model.reduction, cls_only=True)
        return Encoded(model.project_image(tokens).float(), None)

    def score(
        self,
        rows: Tensor,
        columns: Tensor,
        *,
        images: Encoded | None = None,
        guided: Tensor | None = None,
    ) -> Tensor:
        """Return the scores (P,) on the CPU of pairs of images and texts, by number (P,) int64.

        `images` are the encoded images. With `guided`, images (I, 3, S, S), each pair encodes its
        image, whose reduction its text guides.
        """
        scores = []
        for row, column in zip(
            rows.split(self.batch_size), columns.split(self.batch_size), strict=True
        ):
            ids, mask = self.ids[column].to(self.device), self.mask[column].to(self.device)
            if guided is not None:
                pixels = guided[row].to(self.device)
                values, real = self.encode(pixels, self.model.text_cls(ids, mask))
            else:
                values = images.values[row].to(self.device)
                real = None if images.mask is None else images.mask[row].to(self.device)
            if self.method == "itm":
                matched = self.model.matching_logits(values, real, ids, mask)
            else:
                with no_autocast(values):
                    matched = (values * self.features[column.to(self.device)]).sum(1)
            scores.append(matched.float().cpu())
        return torch.cat(scores)
