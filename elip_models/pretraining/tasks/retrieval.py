"""Image-text retrieval: recall@k both ways, by features or re-ranked by image-text matching.

    ITC      (I, T) similarities of features, each side encoded alone
    ITM      matching score of each query with its k most similar candidates, encoded together
    score    ITM (ALBEF), or ITM + ITC (BLIP); all other candidates rank after these k

From image to text, a query is correct at k if any caption of the image is among the k best texts.
From text to image, it is correct if the caption's image is among the k best images. Ties within
1e-6, and candidates that are not re-ranked, count against the model: constant features have a
recall of 0. Intervals are over images, see `intervals`: the captions of an image are drawn
together. Entries of a list that show the same image form one image with all their captions.

A model without features (METER) scores every pair, and one without ITM (CLIP) ranks by features.
Images are encoded without text. With `guided`, a *query* caption guides the reduction of its
candidate images during re-ranking. An image that is the query is never reduced by a caption.
Recall is ours, since torchmetrics has neither several captions for an image nor this rule on ties.
The whole matrix of similarities is in memory: 0.5 GB for the 5,000 images of COCO's test split.
Source: ALBEF (Li et al., 2021), section 4; BLIP (Li et al., 2022).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elip_models.intervals import Interval, score_interval
from elip_models.pretraining.data import DataError, Sample, Source, open_source, other_caption
from elip_models.pretraining.data.derived_sources import group_by_image
from elip_models.pretraining.data.samples import image_number
from elip_models.pretraining.tasks.features import encode_texts, ranks_of, similarities, unguided
from elip_models.pretraining.tasks.pairs import Encoded, PairScorer
from elip_models.pretraining.tasks.task import (
    EvaluationRun,
    Prediction,
    Preprocessor,
    Task,
    TaskScores,
)
from elip_models.validation import Bounds

if TYPE_CHECKING:
    from elip_models.pretraining.models.base import PretrainedModel

KS = (1, 5, 10)
RECALLS = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in KS)
MAX_DRAWS = 1000  # draws for one caption of another image


def recall_at_k(
    similarity: Tensor, text_to_image: Tensor, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return recall@k both ways for a full similarity matrix (num_images, num_texts).

    `text_to_image` (num_texts,) is the row of the image that each text describes.
    """
    ways = zip(("image_to_text", "text_to_image"), _ranks(similarity, text_to_image), strict=True)
    return {f"{way}_r{k}": (rank < k).double().mean().item() for way, rank in ways for k in ks}


def recall_intervals(
    similarity: Tensor, text_to_image: Tensor, of_texts: Tensor | None = None
) -> dict[str, Interval]:
    """Return the recalls with their 95% intervals, with the names of `recall_at_k`.

    `of_texts` (num_texts, num_images) are the scores of text queries, if they are others.
    """
    of_images, of_texts = _ranks(similarity, text_to_image, of_texts)
    ways = {"image_to_text": (of_images, None), "text_to_image": (of_texts, text_to_image.cpu())}
    return {
        f"{way}_r{k}": score_interval((ranks < k).cpu().numpy(), clusters)
        for way, (ranks, clusters) in ways.items()
        for k in KS
    }


def chance_level(
    text_to_image: Tensor, num_images: int, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return the expected recalls of a random ranking, with the names of `recall_at_k`.

    An image with c of the T texts is found at k with probability 1 - C(T-c, k) / C(T, k).
    """
    num_texts = len(text_to_image)
    counts = torch.bincount(text_to_image.cpu(), minlength=num_images).tolist()
    chance = {}
    for k in ks:
        ways = math.comb(num_texts, k)
        missed = sum(math.comb(num_texts - count, k) / ways if ways else 0.0 for count in counts)
        chance[f"image_to_text_r{k}"] = 1.0 - missed / num_images
    return chance | {f"text_to_image_r{k}": min(1.0, k / num_images) for k in ks}


def _ranks(
    similarity: Tensor, text_to_image: Tensor, of_texts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the ranks of the first correct text of each image, and of the image of each text."""
    relevant = torch.arange(len(similarity), device=similarity.device)[:, None] == text_to_image
    of_texts = similarity.T if of_texts is None else of_texts
    return ranks_of(similarity, relevant), ranks_of(of_texts, relevant.T)


class _Index(NamedTuple):
    """Images and captions of the data, with the similarity (I, T) of their features, if any."""

    names: list[str]
    texts: list[str]
    text_to_image: Tensor  # (T,), the image of each text
    similarity: Tensor | None
    images: Encoded | None  # of image-text matching, on the CPU
    pixels: Tensor | None  # (I, 3, S, S), if queries guide the reduction


@dataclass(frozen=True)
class Retrieval(Task):
    """Image-text retrieval in both directions.

    Args:
        candidates: k, the number of candidates that ITM re-ranks, 128 and 256 in the originals. 0
            ranks by features alone.
        adds_similarity: Add the similarity of features to ITM's scores. None: as the original of
            the model does (BLIP adds it).
        guided: A query caption guides the reduction of its candidate images.
    """

    name: ClassVar[str] = "retrieval"
    metrics: ClassVar[tuple[str, ...]] = RECALLS
    candidates: Annotated[int, Bounds(0)] = 128
    adds_similarity: bool | None = None
    guided: bool = False

    def open(self, spec: str, *, image_size: int) -> Source:
        """Open images with captions."""
        return open_source(spec, image_size=image_size)

    def samples(self, source: Source) -> Source:
        """Return one sample for each image, with all of its captions."""
        return group_by_image(source)

    def check(self, model: "PretrainedModel") -> None:
        """Raise ValueError unless the model has features to rank, or image-text matching."""
        if self.guided and not (self.candidates and hasattr(model, "matching_logits")):
            raise ValueError("guided: expected a model and --rerank that re-rank by ITM, got none")
        if self.candidates and not hasattr(model, "matching_logits"):
            super().check(model)
        if not self.candidates and not model.ranks:
            raise ValueError(
                f"model: expected one with features to rank, got {type(model).__name__}, which has "
                "none of images and texts alone; METER needs --rerank"
            )

    def sample(
        self, preprocessor: Preprocessor, sample: Sample, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Return an image with one of its captions, and the negatives and guides the model uses."""
        caption = sample.captions[rng.integers(len(sample.captions))]
        tensors = {"images": preprocessor.image(sample.image, rng), **preprocessor.text(caption)}
        tensors["image_ids"] = torch.tensor(image_number(preprocessor.source, index))
        if preprocessor.model.reads_guide_captions:
            guide = preprocessor.text(other_caption(sample.captions, caption, rng))
            tensors |= {"guide_ids": guide["input_ids"], "guide_mask": guide["attention_mask"]}
        number = getattr(preprocessor.model, "false_texts", 0)  # negatives of METER
        if not number:
            return tensors
        others = _sample_other_captions(preprocessor.source, index, number, rng)
        negatives = [preprocessor.text(text) for text in others]
        return tensors | {
            "false_ids": torch.stack([text["input_ids"] for text in negatives]),
            "false_mask": torch.stack([text["attention_mask"] for text in negatives]),
        }

    def score(self, run: EvaluationRun) -> TaskScores:
        """Score recall@k both ways."""
        matches = self.candidates > 0 and hasattr(run.model, "matching_logits")
        with unguided():
            index = self._index(run, matches=matches)
            scored = self._matched(run, index) if matches else (index.similarity, None)
        owners = index.text_to_image
        baselines = {"chance": chance_level(owners, len(index.names))}
        if matches and index.similarity is not None:
            baselines["features"] = recall_at_k(index.similarity, owners)
        best = scored[0].argmax(1)
        right = (owners[best] == torch.arange(len(best), device=best.device)).double()
        texts = [index.texts[text] for text in best.tolist()]
        return TaskScores(
            task=self.name,
            scores=recall_intervals(scored[0], owners, scored[1]),
            baselines=baselines,
            num_examples=len(index.names),
            predictions=tuple(map(Prediction, index.names, texts, right.tolist())),
            notes={
                "captions": str(len(index.texts)),
                "ranked by": f"ITM of {self.candidates} candidates" if matches else "features",
            },
        )

    def _index(self, run: EvaluationRun, *, matches: bool) -> _Index:
        """Encode all images without text, and all captions alone."""
        model, features, tokens, masks, pixels = run.model, [], [], [], []
        names, captions = [], []
        for batch in run.batches:
            images = batch.images.to(run.device)
            if matches:
                values, mask = model.matching_tokens(images)
                tokens.append(values.float().cpu())
                masks += [] if mask is None else [mask.cpu()]
                pixels += [batch.images] if self.guided else []
            if model.ranks:
                projected = model.project_image(values) if matches else model.image_features(images)
                features.append(projected.float())
            names += batch.ids
            captions += batch.captions
        texts = [text for several in captions for text in several]
        owners = torch.tensor([image for image, several in enumerate(captions) for _ in several])
        similarity = None
        if model.ranks:
            size, progress = run.loading.batch_size, run.loading.progress
            of_texts = encode_texts(model, run.tokenizer, texts, size, progress)
            similarity = similarities(torch.cat(features), of_texts)
            similarity = similarity.cpu() if matches else similarity
            owners = owners.to(similarity.device)
        images = Encoded(torch.cat(tokens), torch.cat(masks) if masks else None) if tokens else None
        return _Index(
            names, texts, owners, similarity, images, torch.cat(pixels) if pixels else None
        )

    def _matched(self, run: EvaluationRun, index: _Index) -> tuple[Tensor, Tensor]:
        """Return the scores of pairs: (I, T) for image queries, (T, I) for text queries."""
        model, loading, similarity = run.model, run.loading, index.similarity
        pairs = PairScorer(model, run.tokenizer, index.texts, "itm", loading.batch_size)
        num_images, num_texts = len(index.names), len(index.texts)
        scores = torch.full((2, num_images, num_texts), -math.inf)
        queries = num_images + num_texts
        for row in range(num_images):
            texts = self._candidates(None if similarity is None else similarity[row], num_texts)
            images = torch.full_like(texts, row)
            scores[0, row, texts] = pairs.score(images, texts, images=index.images)
            loading.progress("query", row + 1, queries)
        for column in range(num_texts):
            of_text = None if similarity is None else similarity[:, column]
            images = self._candidates(of_text, num_images)
            texts = torch.full_like(images, column)
            scores[1, images, column] = pairs.score(
                images, texts, images=index.images, guided=index.pixels
            )
            loading.progress("query", num_images + column + 1, queries)
        adds = self.adds_similarity
        if adds is None:
            adds = getattr(model, "adds_similarity", False)
        if similarity is not None and adds:
            scores += similarity
        return scores[0], scores[1].T

    def _candidates(self, similarity: Tensor | None, number: int) -> Tensor:
        if similarity is None:
            return torch.arange(number)
        return similarity.topk(min(self.candidates, number)).indices


def _sample_other_captions(
    source: Source, index: int, number: int, rng: np.random.Generator
) -> list[str]:
    """Draw captions of other images. Raise DataError if almost no other image has one."""
    texts: list[str] = []
    own, others = image_number(source, index), max(1, len(source) - 1)
    for _ in range(MAX_DRAWS * number):
        if len(texts) == number:
            return texts
        other = (index + 1 + int(rng.integers(others))) % len(source)
        is_other = image_number(source, other) != own
        if is_other and (captions := source.captions(other)):
            texts.append(captions[rng.integers(len(captions))])
    raise DataError(
        f"false_texts: expected captions of other images, got {len(texts)} in "
        f"{MAX_DRAWS * number} draws from {len(source)} samples"
    )
