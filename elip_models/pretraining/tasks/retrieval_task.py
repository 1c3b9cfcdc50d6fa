"""Fine-tuned image-text retrieval: features rank all candidates, and ITM re-ranks the best.

    ITC      (I, T) similarities of features, each side encoded alone
    ITM      matching score of each query with its k most similar candidates, encoded together
    score    ITM (ALBEF), or ITM + ITC (BLIP); all other candidates rank after these k

A model without features (METER) scores every pair, and one without ITM (CLIP) ranks by features.
Ties, and candidates beyond the first k, count against the model as in `retrieval`. Images are
encoded without text. With `guided`, a *query* caption guides the reduction of its
candidate images during re-ranking. An image that is the query is never reduced by a caption.
Source: ALBEF (Li et al., 2021), section 4; BLIP (Li et al., 2022).
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.intervals import Interval
from elip_models.pretraining.data import (
    DataError,
    EvaluationBatch,
    Sample,
    Source,
    evaluation_batches,
    open_source,
    other_caption,
)
from elip_models.pretraining.data.shared_images import group_by_image, image_number
from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.tasks.features import encode_texts, isolated_rng, ranks_of
from elip_models.pretraining.tasks.retrieval import RECALLS, chance_level, recall_intervals
from elip_models.pretraining.tasks.task import (
    Loading,
    Prediction,
    Preprocessor,
    Progress,
    Task,
    TaskScores,
    read_all,
)
from elip_models.reduction.user_warnings import UnguidedWarning
from elip_models.validation import PositiveInt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.models.base import PretrainedModel

MAX_DRAWS = 1000  # draws for one caption of another image


@dataclass(frozen=True)
class Retrieval(Task):
    """Image-text retrieval in both directions.

    Args:
        candidates: k, the number of re-ranked candidates; the originals use 128 and 256.
        adds_similarity: Add the similarity of features to ITM's scores. None: as the original of
            the model does (BLIP adds it).
        guided: A query caption guides the reduction of its candidate images.
    """

    name: ClassVar[str] = "retrieval"
    metrics: ClassVar[tuple[str, ...]] = RECALLS
    candidates: PositiveInt = 128
    adds_similarity: bool | None = None
    guided: bool = False

    def open(self, spec: str, *, image_size: int) -> Source:
        """Open images with captions."""
        return open_source(spec, image_size=image_size)

    def sample(
        self, preprocessor: Preprocessor, sample: Sample, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Return an image with one of its captions, and the negatives and guides the model uses."""
        caption = sample.captions[rng.integers(len(sample.captions))]
        found = {"images": preprocessor.image(sample.image, rng), **preprocessor.text(caption)}
        found["image_ids"] = torch.tensor(image_number(preprocessor.source, index))
        if preprocessor.model.reads_guide_captions:
            guide = preprocessor.text(other_caption(sample.captions, caption, rng))
            found |= {"guide_ids": guide["input_ids"], "guide_mask": guide["attention_mask"]}
        number = getattr(preprocessor.model, "false_texts", 0)  # negatives of METER
        if not number:
            return found
        others = _sample_other_captions(preprocessor.source, index, number, rng)
        negatives = [preprocessor.text(text) for text in others]
        return found | {
            "false_ids": torch.stack([text["input_ids"] for text in negatives]),
            "false_mask": torch.stack([text["attention_mask"] for text in negatives]),
        }

    def evaluate(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: Source,
        loading: Loading,
        answers: Sequence[str] | None = None,
    ) -> TaskScores:
        """Score recall@k both ways; see `Task.evaluate`."""
        batches, report = read_all(evaluation_batches, model, group_by_image(source), loading)
        drawn = isolated_rng(next(model.parameters()).device)
        with eval_mode(model), torch.no_grad(), drawn, warnings.catch_warnings():
            # Models warn when no text guides the reduction of image tokens; here none should.
            warnings.simplefilter("ignore", UnguidedWarning)
            index = _Index.encode(model, tokenizer, batches, loading, guided=self.guided)
            similar = index.similarities()
            by_features = (similar, similar.T) if similar is not None else None
            matches = hasattr(model, "matching_logits")
            scored = self._scores(index, similar, loading.progress) if matches else by_features
            of_images, of_texts = scored
        baselines = {"chance": chance_level(index.text_to_image, len(index.tokens))}
        if matches and by_features is not None:
            found = _recalls(*by_features, index.text_to_image)
            baselines["features"] = {name: recall.mean for name, recall in found.items()}
        first = of_images.argmax(1)
        found_texts = [index.texts[text] for text in first.tolist()]
        correct = (index.text_to_image[first] == torch.arange(len(first))).double().tolist()
        return TaskScores(
            task=self.name,
            scores=_recalls(of_images, of_texts, index.text_to_image),
            baselines=baselines,
            num_examples=len(index.tokens),
            num_skipped=len(report.reasons),
            predictions=tuple(map(Prediction, index.names, found_texts, correct)),
        )

    def _scores(
        self, index: "_Index", similar: Tensor | None, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of pairs: (I, T) for image queries, (T, I) for text queries."""
        images, texts = len(index.tokens), len(index.ids)
        scores = torch.full((2, images, texts), -math.inf)
        for row in range(images):
            chosen = self._candidates(None if similar is None else similar[row], texts)
            scores[0, row, chosen] = index.match(torch.full_like(chosen, row), chosen)
            progress("query", row + 1, images + texts)
        for row in range(texts):
            chosen = self._candidates(None if similar is None else similar[:, row], images)
            query = torch.full_like(chosen, row)
            guide = row if self.guided else None
            scores[1, chosen, row] = index.match(chosen, query, guide=guide)
            progress("query", images + row + 1, images + texts)
        adds = self.adds_similarity
        if adds is None:
            adds = getattr(index.model, "adds_similarity", False)
        if similar is not None and adds:
            scores += similar
        return scores[0], scores[1].T

    def _candidates(self, similar: Tensor | None, number: int) -> Tensor:
        if similar is None:
            return torch.arange(number)
        return similar.topk(min(self.candidates, number)).indices


def _sample_other_captions(
    source: Source, index: int, number: int, rng: np.random.Generator
) -> list[str]:
    """Draw captions of other images. Raise DataError if almost no other image has one."""
    found: list[str] = []
    own, others = image_number(source, index), max(1, len(source) - 1)
    for _ in range(MAX_DRAWS * number):
        if len(found) == number:
            return found
        other = (index + 1 + int(rng.integers(others))) % len(source)
        is_other = image_number(source, other) != own
        if is_other and (captions := source.captions(other)):
            found.append(captions[rng.integers(len(captions))])
    raise DataError(
        f"false_texts: expected captions of other images, got {len(found)} in "
        f"{MAX_DRAWS * number} draws from {len(source)} samples"
    )


@dataclass(frozen=True)
class _Index:
    """Encoded images and texts, on the CPU."""

    model: "PretrainedModel"
    tokens: Tensor  # (N, D) of each image
    masks: Tensor | None  # (N,) of each image; None: all tokens are real
    images: Tensor | None  # (3, S, S) of each image, if queries guide the reduction
    features: tuple[Tensor, Tensor] | None  # (I, E) and (T, E)
    ids: Tensor  # (T, L)
    mask: Tensor  # (T, L)
    text_to_image: Tensor  # (T,), the image of each text
    names: list[str]  # ids of the images
    texts: list[str]
    batch_size: int  # pairs in one forward pass

    @classmethod
    def encode(
        cls,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batches: "Iterable[EvaluationBatch]",
        loading: Loading,
        *,
        guided: bool,
    ) -> "_Index":
        """Encode all images without text, and all captions alone."""
        device = next(model.parameters()).device
        every_tokens, every_features, masks, images = [], [], [], []
        captions, names = [], []
        for batch in batches:
            if hasattr(model, "matching_tokens"):
                tokens, mask = model.matching_tokens(batch.images.to(device))
                features = model.project_image(tokens) if model.ranks else None
            else:  # a model with features only
                features, mask = model.image_features(batch.images.to(device)), None
                tokens = features[:, None]
            every_tokens.append(tokens.float().cpu())
            if mask is not None:
                masks.append(mask.cpu())
            images.append(batch.images)
            if features is not None:
                every_features.append(features.float().cpu())
            captions += batch.captions
            names += batch.ids
        texts = [text for several in captions for text in several]
        text_to_image = [image for image, several in enumerate(captions) for _ in several]
        features = None
        if model.ranks:
            size, progress = loading.batch_size, loading.progress
            text_features = encode_texts(model, tokenizer, texts, size, progress).cpu()
            features = torch.cat(every_features), text_features
        tokenized = model.tokenise(tokenizer, texts)
        return cls(
            model=model,
            tokens=torch.cat(every_tokens),
            masks=torch.cat(masks) if masks else None,
            images=torch.cat(images) if guided else None,
            features=features,
            ids=tokenized["input_ids"],
            mask=tokenized["attention_mask"],
            text_to_image=torch.tensor(text_to_image),
            names=names,
            texts=texts,
            batch_size=loading.batch_size,
        )

    def similarities(self) -> Tensor | None:
        if self.features is None:
            return None
        images, texts = self.features
        with no_autocast(images):
            return images @ texts.T

    def match(self, images: Tensor, texts: Tensor, guide: int | None = None) -> Tensor:
        """Return the matching scores (P,) of pairs of images and texts, given by index (P,).

        Text `guide` guides the reduction of the images.
        """
        device = next(self.model.parameters()).device
        found = []
        for some, others in zip(
            images.split(self.batch_size), texts.split(self.batch_size), strict=True
        ):
            tokens, mask = self._tokens(some, guide, device)
            ids, real = self.ids[others].to(device), self.mask[others].to(device)
            found.append(self.model.matching_logits(tokens, mask, ids, real).float().cpu())
        return torch.cat(found)

    def _tokens(
        self, images: Tensor, guide: int | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        if guide is None:
            mask = None if self.masks is None else self.masks[images].to(device)
            return self.tokens[images].to(device), mask
        rows = slice(guide, guide + 1)
        text_cls = self.model.text_cls(self.ids[rows].to(device), self.mask[rows].to(device))
        pixels = self.images[images].to(device)
        return self.model.matching_tokens(pixels, text_cls.expand(len(pixels), -1))


def _recalls(of_images: Tensor, of_texts: Tensor, text_to_image: Tensor) -> dict[str, Interval]:
    """Return recall@k both ways, from scores (I, T) of image queries and (T, I) of text queries."""
    relevant = torch.arange(len(of_images))[:, None] == text_to_image[None]
    ranks = ranks_of(of_images, relevant), ranks_of(of_texts, relevant.T)
    return recall_intervals(*ranks, text_to_image)
